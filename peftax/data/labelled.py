"""Rows of a text and its label to examples of a classifier."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peftax.data.chat import Example


def encode(row: Mapping[str, Any], tokenizer: Any, *, labels: Sequence[str]) -> Example:
    """One row, `{"text": ..., "label": ...}`, or `prompt` and `completion` as templates make them, to an `Example`.

    The text has the tokenizer's own marks ([CLS], [SEP], bos). A label is one of `labels`, or its number, also as text.
    """
    text = row.get("text", row.get("prompt"))
    label = row.get("label", row.get("completion"))
    if not isinstance(text, str) or label is None:
        raise ValueError(
            f"a row needs 'text' and 'label'; this one has {sorted(row)}: make these of its columns with "
            "config.data.prompt and config.data.completion"
        )
    tokens = np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int32)
    if not len(tokens):
        raise ValueError("the text has no token")
    weights = np.zeros(len(tokens), np.float32)
    weights[-1] = 1.0
    return Example(tokens, weights, label=number(label, labels))


def number(label: Any, labels: Sequence[str]) -> int:
    """The number of a label that is one of `labels` or its number."""
    text = str(label).strip()
    if text in labels:
        return labels.index(text)
    if text.isdigit() and int(text) < len(labels):
        return int(text)
    near = difflib.get_close_matches(text, labels, n=1, cutoff=0.0)
    raise ValueError(
        f"label {text!r} is none of config.model.labels, {', '.join(labels)}, nor the number of one; nearest: {near[0]}"
    )
