"""How a batch lies on a mesh: rows over some mesh axes, the tokens of a row over others."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding


def row_axes(lies: NamedSharding) -> tuple[str, ...]:
    """The mesh axes that the rows of a batch, the first axis of x, are split over."""
    return tuple(jax.tree.leaves(tuple(lies.spec)[:1]))


def token_axes(lies: NamedSharding) -> tuple[str, ...]:
    """The mesh axes that the tokens of each row, the second axis of x, are split over; those of size 1 left out."""
    return tuple(a for a in jax.tree.leaves(tuple(lies.spec)[1:2]) if lies.mesh.shape[a] > 1)


def parts(mesh: Mesh | AbstractMesh, axes: Any) -> int:
    """Into how many parts these mesh axes (one, several, none) split an axis."""
    return math.prod(mesh.shape[a] for a in jax.tree.leaves(axes))


def lead(lies: NamedSharding, x: Any) -> tuple[Any, ...]:
    """Over which mesh axes those of x but the last lie, [B, T, ..., D]; of token ids all, [B, T].

    An axis that they do not divide stays whole (None): of a decoding step, say, which has one token a row.
    """
    n = x.ndim if jax.numpy.issubdtype(x.dtype, jax.numpy.integer) else x.ndim - 1
    over = (row_axes(lies), token_axes(lies), *((),) * x.ndim)[:n]
    return tuple(a if a and x.shape[i] % parts(lies.mesh, a) == 0 else None for i, a in enumerate(over))
