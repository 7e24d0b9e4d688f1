"""Tree paths to Hugging Face names and back: the one place that knows how a leaf stands in a file.

A leaf `kernel | embedding | scale` is called `weight` there, everything else keeps its name.
Kernels end in (in, out) here and begin with (out, in) there; what stands before `in` (a
convolution's window) comes last: [kh, kw, in, out] is [out, in, kh, kw]. Scanned layers share one
leaf with a leading layer axis: its path holds "layers" and no number after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from peftax.core import tree as trees

WEIGHTS = ("kernel", "embedding", "scale")


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


def walk(tree: trees.Tree, *, stack: str = "layers") -> Iterator[Leaf]:
    """The leaves of a tree of arrays or shapes, in the tree's own order.

    stack: the component after which a layer number stands in Hugging Face's names.
    """
    for path, x in trees.flatten(tree).items():
        stacked = is_stacked(path, stack=stack)
        layers: Any = range(x.shape[0]) if stacked else (None,)
        names = tuple(to_hf(path, layer=layer, stack=stack) for layer in layers)
        yield Leaf(path, names, tuple(x.shape), np.dtype(x.dtype), stacked)


def is_stacked(path: str, *, stack: str = "layers") -> bool:
    """Does the path of a module or leaf stand for all layers at once?"""
    _, found, after = _cut(path.split("/"), stack)
    return found and bool(after) and not after[0].isdigit()


def to_hf(path: str, *, layer: int | None = None, stack: str = "layers") -> str:
    """A module's or leaf's path as Hugging Face's name; a stacked one needs its layer."""
    before, found, after = _cut(path.split("/"), stack)
    stacked = is_stacked(path, stack=stack)
    if stacked != (layer is not None):
        problem = "stands for every layer: say which" if stacked else "has no layer axis"
        raise ValueError(f"{path}: {problem} (layer={layer})")
    parts = [*before, *([stack] if found else []), *([str(layer)] if stacked else []), *after]
    if parts[-1] in WEIGHTS:
        parts[-1] = "weight"
    return ".".join(parts)


def from_hf(name: str, *, scanned: bool, stack: str = "layers") -> tuple[str, int | None]:
    """A module's name -> (path, layer); the layer is None unless the layers are scanned.

    Only modules: whether a `weight` is a kernel, a table or a scale, the tree alone knows.
    """
    before, found, after = _cut(name.split("."), stack)
    if not (scanned and found and after and after[0].isdigit()):
        return name.replace(".", "/"), None
    return "/".join((*before, stack, *after[1:])), int(after[0])


def _cut(parts: list[str], stack: str) -> tuple[list[str], bool, list[str]]:
    at = parts.index(stack) if stack in parts else len(parts)
    return parts[:at], at < len(parts), parts[at + 1 :]
