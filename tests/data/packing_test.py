import dataclasses
from collections import Counter

import numpy as np
import pytest

from peftax.data import packing
from peftax.data.chat import Example


def examples(count=40, seed=0, longest=20, groups=False):
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        n = int(rng.integers(2, longest + 1))
        tokens = rng.integers(1, 50, n).astype(np.int32)
        weights = (rng.random(n) < 0.5).astype(np.float32)
        weights[0] = 0
        out.append(Example(tokens, weights, tokens % 2 if groups else None))
    return out


def triples(rows):
    """(token, position, target, weight) of all that counts."""
    on = rows["weights"] > 0
    keys = ("tokens", "positions", "targets", "weights")
    return Counter(zip(*(rows[k][on].tolist() for k in keys), strict=True))


@pytest.mark.parametrize("window", [1, 3, 64])
def test_packed_and_unpacked_count_the_same(window):
    some = examples()
    packed, padded = packing.pack(some, 32, window=window), packing.pad(some, 32)
    assert triples(packed) == triples(padded)
    assert len(padded["tokens"]) == len(some) > len(packed["tokens"])
    assert (packed["segment_ids"] > 0).sum() == sum(len(e.tokens) for e in some)
    assert packing.fill(packed) > packing.fill(padded)


def test_segments_are_the_examples_and_never_cross():
    some = examples()
    packed = packing.pack(some, 32)
    found = []
    for r in range(len(packed["tokens"])):
        ids = packed["segment_ids"][r]
        count = ids.max()
        assert set(ids[ids > 0]) == set(range(1, count + 1))
        assert (np.diff(np.flatnonzero(ids)) == 1).all()  # padding only on the right
        for segment in range(1, count + 1):
            here = np.flatnonzero(ids == segment)
            assert packed["positions"][r, here].tolist() == list(range(len(here)))
            assert packed["weights"][r, here[-1]] == 0
            tokens = packed["tokens"][r, here]
            assert packed["targets"][r, here[:-1]].tolist() == tokens[1:].tolist()
            found.append(tuple(tokens.tolist()))
    assert sorted(found) == sorted(tuple(e.tokens.tolist()) for e in some)
    outside = packed["segment_ids"] == 0
    assert not any(packed[k][outside].any() for k in ("tokens", "targets", "weights", "positions"))


def test_packing_is_deterministic_and_fits_best():
    a, b = packing.pack(examples(), 32), packing.pack(examples(), 32)
    assert all((a[k] == b[k]).all() for k in a)
    sized = [Example(np.full(n, n, np.int32), np.ones(n, np.float32)) for n in (6, 7, 3, 4, 10)]
    rows = packing.pack(sized, 10)["tokens"]
    assert [sorted(set(r.tolist())) for r in rows] == [[4, 6], [3, 7], [10]]


def test_dtypes_and_groups():
    rows = packing.pack(examples(groups=True), 32)
    assert {k: v.dtype.name for k, v in rows.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "weights": "float32",
        "positions": "int32",
        "segment_ids": "int32",
        "groups": "int32",
    }
    on = rows["weights"] > 0
    assert (rows["groups"][on] == rows["targets"][on] % 2).all()
    assert "groups" not in packing.pack(examples(), 32)


def test_errors():
    with pytest.raises(ValueError, match="a row holds 8: apply a length policy"):
        packing.pack(examples(), 8)
    with pytest.raises(ValueError, match="a row holds 8: apply a length policy"):
        packing.pad(examples(), 8)
    with pytest.raises(ValueError, match="the split is empty"):
        packing.pack([], 8)


def test_a_row_holds_examples_of_one_task():
    some = [dataclasses.replace(e, task=i % 3) for i, e in enumerate(examples())]
    packed, padded = packing.pack(some, 32), packing.pad(some, 32)
    assert triples(packed) == triples(padded) and len(packed["tokens"]) < len(some)
    assert padded["tasks"].tolist() == [[i % 3] for i in range(len(some))]
    task_of = {tuple(e.tokens.tolist()): e.task for e in some}
    for r, (task,) in enumerate(packed["tasks"]):
        for segment in range(1, packed["segment_ids"][r].max() + 1):
            assert task_of[tuple(packed["tokens"][r, packed["segment_ids"][r] == segment].tolist())] == task
    with pytest.raises(ValueError, match="some examples have a task_id and some have none"):
        packing.pack([*some, *examples(2)], 32)
