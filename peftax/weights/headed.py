"""A checkpoint as a model asks for it: a base under the prefix of the model that stands on it, and a classifier's head
that its file does not hold. The head is zeros, every label as likely, so that no file has to hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peftax.core import tree as trees
from peftax.core.targets import CLASSIFIERS
from peftax.weights import names
from peftax.weights.source import Source

OLD = {".weight": ".gamma", ".bias": ".beta"}  # how BERT's first files call a norm's


class Headed(Source):
    """A source that knows the model's names too, once it was `fit`."""

    def __init__(self, file: Source):
        self.file, self.path = file, file.path
        self.filed: dict[str, str] = {}  # a name of the model -> of the file
        self.made: dict[str, tuple[int, ...]] = {}  # of the model alone -> its shape

    def fit(self, shapes: trees.Tree) -> None:
        """Learn the names of a model of these shapes."""
        have = set(self.file.names())
        for leaf in names.walk(shapes):
            for name in leaf.names:
                if name in have:
                    continue
                below = name.partition(".")[2]
                old = [n.removesuffix(end) + OLD[end] for n in (name, below) for end in OLD if n.endswith(end)]
                if (found := next((n for n in (below, *old) if n in have), None)) is not None:
                    self.filed[name] = found
                elif name.split(".")[-2:-1] and name.split(".")[-2] in CLASSIFIERS:
                    self.made[name] = leaf.tensor_shape

    @property
    def config(self) -> Mapping[str, Any]:
        return self.file.config

    def names(self) -> list[str]:
        own = {filed: name for name, filed in self.filed.items()}
        return [*(own.get(name, name) for name in self.file.names()), *self.made]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.made[name] if name in self.made else self.file.shape(self.filed.get(name, name))

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32) if name in self.made else self.file.dtype(self.filed.get(name, name))

    def read(self, name: str, *, index: tuple[slice, ...] | None = None) -> np.ndarray:
        if name in self.made:
            return np.zeros(self.made[name], np.float32)[index or ...]
        return self.file.read(self.filed.get(name, name), index=index)

    def packed(self, name: str) -> str | None:
        return None if name in self.made else self.file.packed(self.filed.get(name, name))

    def read_packed(self, name: str):
        return self.file.read_packed(self.filed.get(name, name))

    def tokenizer(self) -> Any:
        return self.file.tokenizer()

    def generation(self) -> Mapping[str, Any]:
        return self.file.generation()
