"""A base with more tokens than its file: a tokenizer that has learnt some, and tables with rows for them.

The rows are always the same, so that no file has to hold them: the mean of the file's own rows (which the default of
transformers' `resize_token_embeddings` is up to a noise of 3e-5 of their spread), or N(0, initializer_range) from a
fixed seed.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peftax.core import tree as trees
from peftax.weights import names
from peftax.weights.source import Source

STARTS = ("mean", "normal")


class Grown(Source):
    """A source whose config has a larger vocabulary; `tables` are its tensors with rows of their own for it."""

    def __init__(self, file: Source, tokenizer: Any, start: str):
        self.file, self.path, self.start, self._tokenizer = file, file.path, start, tokenizer
        self.old = file.config["vocab_size"]
        self.new = max(self.old, len(tokenizer))
        self.tables: set[str] = set()

    @property
    def config(self) -> Mapping[str, Any]:
        return {**self.file.config, "vocab_size": self.new}

    def for_model(self, shapes: trees.Tree) -> dict[str, int]:
        """{path of a table in a model of these shapes: how many rows the file holds}; from now on the rest is made."""
        paths = {}
        for leaf in names.walk(shapes) if self.new > self.old else ():
            (name, *more), (rows, *rest) = leaf.names, leaf.tensor_shape
            if not more and rows == self.new and self.file.shape(name) == (self.old, *rest):
                self.tables.add(name)
                paths[leaf.path] = self.old
        return paths

    def names(self) -> list[str]:
        return self.file.names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.file.shape(name)
        return (self.new, *shape[1:]) if name in self.tables else shape

    def dtype(self, name: str) -> np.dtype:
        return self.file.dtype(name)

    def read(self, name: str, *, index: tuple[slice, ...] | None = None) -> np.ndarray:
        if name not in self.tables:
            return self.file.read(name, index=index)
        rows, *rest = index or tuple(slice(0, n) for n in self.shape(name))
        old = self.file.read(name, index=(slice(min(rows.start, self.old), min(rows.stop, self.old)), *rest))
        new = self._rows(name)[(slice(max(rows.start - self.old, 0), max(rows.stop - self.old, 0)), *rest)]
        return np.concatenate([old, new])

    @functools.cache  # noqa: B019
    def _rows(self, name: str) -> np.ndarray:
        width = self.file.shape(name)[1]
        if self.start == "normal":
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            size = (self.new - self.old, width)
            return rng.normal(0.0, self.config.get("initializer_range", 0.02), size).astype(self.dtype(name))
        total, step = np.zeros(width), 8192
        for first in range(0, self.old, step):
            rows = slice(first, min(first + step, self.old))
            total += self.file.read(name, index=(rows, slice(0, width))).astype(np.float64).sum(0)
        return np.tile(total / self.old, (self.new - self.old, 1)).astype(self.dtype(name))

    def packed(self, name: str) -> str | None:
        return None if name in self.tables else self.file.packed(name)

    def read_packed(self, name: str):
        return self.file.read_packed(name)

    def tokenizer(self) -> Any:
        return self._tokenizer

    def generation(self) -> Mapping[str, Any]:
        return self.file.generation()


def grow(file: Source, tokens: Sequence[str], *, start: str = "mean", tokenizer: Any = None) -> Source:
    """`file` with these tokens in its tokenizer, and rows for them where its tables have none to spare.

    tokenizer: one that has more tokens, in place of the file's own.
    """
    if start not in STARTS:
        raise ValueError(f"config.model.new_rows {start!r} is none of {', '.join(map(repr, STARTS))}")
    if not tokens and tokenizer is None:
        return file
    tokenizer = file.tokenizer() if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError(f"{file.path}: holds no tokenizer that could learn {tokens[0]!r}; lay tokenizer.json there")
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in tokens])
    return Grown(file, tokenizer, start)
