import io
import tarfile

import numpy as np
import pytest

from peftax.data import chat, labelled, movie_reviews, packing
from tests.data import tiny

LABELS = ("negative", "positive")


def test_rows_and_what_a_label_may_be():
    tok = tiny.tokenizer()
    for row in (
        {"text": "the answer", "label": "positive"},
        {"text": "the answer", "label": 1},
        {"prompt": "the answer", "completion": " positive"},
        {"prompt": "the answer", "completion": "1"},
    ):
        example = labelled.encode(row, tok, labels=LABELS)
        assert example.label == 1 and example.tokens.tolist() == tok("the answer")["input_ids"]
    with pytest.raises(ValueError, match="label 'postive' is none of config.model.labels, .* nearest: positive"):
        labelled.encode({"text": "x", "label": "postive"}, tok, labels=LABELS)
    with pytest.raises(ValueError, match="'2' is none of"):
        labelled.encode({"text": "x", "label": 2}, tok, labels=LABELS)
    with pytest.raises(ValueError, match=r"needs 'text' and 'label'; this one has \['sentence'\]"):
        labelled.encode({"sentence": "x"}, tok, labels=LABELS)


def test_packed_the_label_is_all_that_counts_and_stands_at_the_last_token():
    rows = [{"text": "the answer is 42", "label": 1}, {"text": "weather", "label": 0}]
    found, counts = chat.encode_all(
        rows, tiny.tokenizer(), length=99, encode=lambda r, t: labelled.encode(r, t, labels=LABELS)
    )
    assert counts["learned"] == 2
    a, b = (len(e.tokens) for e in found)
    packed = packing.pack(found, 99)
    at = np.flatnonzero(packed["weights"][0])
    assert at.tolist() == [a - 1, a + b - 1] and packed["targets"][0, at].tolist() == [1, 0]
    assert packed["targets"][0].sum() == 1 and packed["segment_ids"][0, at].tolist() == [1, 2]


def test_a_cut_keeps_the_last_token():
    example = labelled.encode({"text": "the answer is 42, of course", "label": 1}, tiny.tokenizer(), labels=LABELS)
    short = chat.truncate(example, 3)
    assert short.tokens.tolist() == [*example.tokens[:2], example.tokens[-1]] and short.label == 1
    assert short.weights.tolist() == [0, 0, 1]


def test_movie_reviews(tmp_path):
    lines = ["1\t2.5\tA  joy.", "2\t-0.4\tWell.", "3\t-1.25\tDull; dull.", "4\t3.0\ta joy"]

    def packed(name, data):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            (info := tarfile.TarInfo(name)).size = len(data)
            archive.addfile(info, io.BytesIO(data))
        return buffer.getvalue()

    inner = packed(f"hutto/{movie_reviews.INNER}", "\r\n".join(lines).encode())
    (tmp_path / "v.tar.gz").write_bytes(packed(f"vader-1/more/{movie_reviews.OUTER}", inner))
    rows = movie_reviews.load(tmp_path / "v.tar.gz")
    assert [(r["text"], r["label"]) for r in rows] == [
        ("A  joy.", "positive"),
        ("Dull; dull.", "negative"),
        ("a joy", "positive"),
    ]
    parts = movie_reviews.split(rows)
    assert sum(map(len, parts.values())) == 3
    (where,) = (name for name, part in parts.items() if rows[0] in part)
    assert rows[2] in parts[where]  # the same words
