"""Tree paths to Hugging Face names and back: the one place that knows how a leaf stands in a file.

A leaf `kernel | embedding | scale` is called `weight` there, everything else keeps its name.
Kernels end in (in, out) here and begin with (out, in) there; what stands before `in` (a
convolution's window) comes last: [kh, kw, in, out] is [out, in, kh, kw]. Scanned layers share one
leaf with a leading layer axis: its path holds "layers" (BERT's "layer") and no number after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from peftax.core import tree as trees

WEIGHTS = ("kernel", "embedding", "scale")
STACKS = ("layers", "layer")  # after which a layer's number stands in Hugging Face's names


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the tree and the tensors it is made of: one per layer when stacked, else one."""

    path: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of one layer's part in the order they have in the file."""
        n = len(self.shape) - self.stacked
        if self.path.rsplit("/", 1)[-1] == "kernel" and n >= 2:
            return (n - 1, n - 2, *range(n - 2))
        return tuple(range(n))

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        own = self.shape[self.stacked :]
        return tuple(own[axis] for axis in self.order)

    def to_file(self, part: np.ndarray) -> np.ndarray:
        """One layer's part as the file holds it (a view)."""
        return part.transpose(self.order)

    def to_tree(self, tensor: np.ndarray) -> np.ndarray:
        """The file's tensor, or a slice of it, as the tree holds it (a view)."""
        return tensor.transpose(np.argsort(self.order))


def walk(tree: trees.Tree) -> Iterator[Leaf]:
    """The leaves of a tree of arrays or shapes, in the tree's own order."""
    for path, x in trees.flatten(tree).items():
        stacked = is_stacked(path)
        layers: Any = range(x.shape[0]) if stacked else (None,)
        names = tuple(to_hf(path, layer=layer) for layer in layers)
        yield Leaf(path, names, tuple(x.shape), np.dtype(x.dtype), stacked)


def is_stacked(path: str) -> bool:
    """Does the path of a module or leaf stand for all layers at once?"""
    _, stack, after = _cut(path.split("/"))
    return bool(stack) and bool(after) and not after[0].isdigit()


def to_hf(path: str, *, layer: int | None = None) -> str:
    """A module's or leaf's path as Hugging Face's name; a stacked one needs its layer."""
    before, stack, after = _cut(path.split("/"))
    stacked = is_stacked(path)
    if stacked != (layer is not None):
        problem = "stands for every layer: say which" if stacked else "has no layer axis"
        raise ValueError(f"{path}: {problem} (layer={layer})")
    parts = [*before, *stack, *([str(layer)] if stacked else []), *after]
    if parts[-1] in WEIGHTS:
        parts[-1] = "weight"
    return ".".join(parts)


def from_hf(name: str, *, scanned: bool) -> tuple[str, int | None]:
    """A module's name -> (path, layer); the layer is None unless the layers are scanned.

    Only modules: whether a `weight` is a kernel, a table or a scale, the tree alone knows.
    """
    before, stack, after = _cut(name.split("."))
    if not (scanned and stack and after and after[0].isdigit()):
        return name.replace(".", "/"), None
    return "/".join((*before, *stack, *after[1:])), int(after[0])


def _cut(parts: list[str]) -> tuple[list[str], list[str], list[str]]:
    """What stands before the first of STACKS, that one if there is one, what stands behind."""
    at = next((i for i, part in enumerate(parts) if part in STACKS), len(parts))
    return parts[:at], parts[at : at + 1], parts[at + 1 :]
