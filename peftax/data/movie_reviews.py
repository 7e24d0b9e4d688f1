"""Sentences of movie reviews and what people felt in them, as a task of a config: negative or positive.

10,605 sentences of Rotten Tomatoes reviews, each with the mean of at least ten people's ratings from -4 to 4 (Hutto and
Gilbert, ICWSM 2014), inside the source package of vaderSentiment.
"""

from __future__ import annotations

import functools
import io
import re
import tarfile
import zlib
from pathlib import Path
from typing import Any

from peftax.data import asset

LABELS = ("negative", "positive")
NEUTRAL = 0.5  # a mean rating nearer to 0 is neither
OUTER, INNER = "hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"
SHARES = {"test": range(0, 20), "valid": range(20, 30), "train": range(30, 100)}  # of a hundred


def load(sdist: str | Path) -> list[dict[str, Any]]:
    """Rows of text, label and rating, in the file's order, without those that are neither."""
    with tarfile.open(sdist) as package:
        (outer,) = (m for m in package if m.name.endswith(f"/{OUTER}"))
        data = package.extractfile(outer).read()  # type: ignore[union-attr]
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        (inner,) = (m for m in archive if m.name.rpartition("/")[2] == INNER)
        lines = archive.extractfile(inner).read().decode("utf-8").splitlines()  # type: ignore[union-attr]
    rows = []
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= NEUTRAL:
            rows.append({"text": text.strip(), "label": LABELS[float(rating) > 0], "rating": float(rating)})
    return rows


def split(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Test, valid and train by a hash of each text's words: a sentence that stands twice is in one of them alone."""
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in SHARES}
    for row in rows:
        at = zlib.crc32(" ".join(re.findall(r"\w+", row["text"].lower())).encode()) % 100
        parts[next(name for name, share in SHARES.items() if at in share)].append(row)
    return parts


@functools.cache
def splits() -> dict[str, list[dict[str, Any]]]:
    """Train, valid and test rows; fetches the pinned source package once."""
    return split(load(asset.fetch(*asset.VADER, source=True)))


def examples(name: str) -> list[dict[str, Any]]:
    """The rows of a split, as `config.data.task` reads them."""
    return splits()[name]
