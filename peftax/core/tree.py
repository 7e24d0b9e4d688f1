"""Trees of arrays as flat dictionaries of paths; the two halves of a tree and their union."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from peftax.ops.qtensor import QTensor

Tree = Mapping[str, Any]


def flatten(tree: Tree) -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}; empty dicts vanish."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def split(tree: Tree, chosen: Callable[[str], bool]) -> tuple[dict, dict]:
    """(the rest, the leaves whose path is chosen): two disjoint trees whose union is `tree`."""
    flat = flatten(tree)
    take = {path: leaf for path, leaf in flat.items() if chosen(path)}
    return unflatten({p: x for p, x in flat.items() if p not in take}), unflatten(take)


def merge(*trees: Tree) -> dict[str, Any]:
    """The union of disjoint trees. Raises ValueError where two of them hold the same path."""
    union: dict[str, Any] = {}
    for tree in trees:
        _merge_into(union, tree, ())
    return union


def _merge_into(union: dict, tree: Tree, at: tuple[str, ...]) -> None:
    for key, value in tree.items():
        where = "/".join((*at, key))
        if key not in union:
            union[key] = _copy(value)
        elif isinstance(union[key], dict) and isinstance(value, Mapping):
            _merge_into(union[key], value, (*at, key))
        else:
            raise ValueError(f"merge: both trees hold {where!r}; frozen and trainable must be disjoint")


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def abstract(tree: Any) -> Any:
    """The same tree with shapes and dtypes in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)


def unpacked(tree: Any) -> Any:
    """The same tree in shapes, of packed weights those of the numbers that they stand for."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree, is_leaf=is_packed)


def is_packed(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


def count(tree: Any) -> int:
    """How many numbers the leaves hold."""
    return sum(int(np.prod(np.shape(x))) for x in jax.tree.leaves(unpacked(tree)))


def nbytes(tree: Any) -> int:
    return sum(int(np.prod(np.shape(x))) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def nearest(word: str, among: Iterable[str], n: int = 3) -> str:
    """The n most similar strings, for error messages."""
    close = difflib.get_close_matches(word, list(among), n=n, cutoff=0.0)
    return ", ".join(repr(c) for c in close) or "nothing"
