"""The product of a packed weight in plain XLA: what other kernels are held against, and what runs where none fits."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from peftax.ops.qtensor import QTensor, dense, scales

TILE = 32 << 20  # bytes of numbers of a weight that a GPU makes at a time


def product(x_MxK: jax.Array, w: QTensor, *, transposed: bool = False) -> jax.Array:
    """x @ dense(w), or x @ dense(w)ᵀ: the weight's numbers live as long as the product takes.

    XLA for GPU keeps several copies of these numbers, so that there a large weight goes tile by tile.

    Args:
      x_MxK: [M, K]; [M, N] if transposed.
      w: [K, N].

    Returns:
      [M, N], or [M, K] if transposed, in the dtype of x.
    """
    tile = _tile(w, x_MxK.dtype.itemsize, transposed)
    whole = partial(_whole, transposed=transposed)
    if tile is None:
        return whole(x_MxK, w)
    in_tiles = partial(_in_tiles, transposed=transposed, tile=tile)
    return jax.lax.platform_dependent(x_MxK, w, cuda=in_tiles, default=whole)


def _whole(x, w: QTensor, *, transposed: bool):
    """The product contracts [groups, group] instead of their product K: XLA for TPU then fuses the scales into it."""
    numbers = dense(w.astype(x.dtype))
    if transposed:
        return jax.lax.dot_general(x, numbers, (((1,), (1,)), ((), ())))
    k, n = w.shape
    x = x.reshape(-1, k // w.group, w.group)
    return jax.lax.dot_general(x, numbers.reshape(k // w.group, w.group, n), (((1, 2), (0, 1)), ((), ())))


def _tile(w: QTensor, itemsize: int, transposed: bool) -> int | None:
    """How many columns of y are made at a time: columns of w, if transposed its rows; None: all."""
    k, n = w.shape
    unit = max(w.group, 64) if transposed and w.scale.shape[0] > 1 else 64
    width, other = (k, n) if transposed else (n, k)
    most = TILE // (other * itemsize)
    if width <= most or width % unit:
        return None
    return max((t for t in range(unit, most + 1, unit) if width % t == 0), default=None)


def _in_tiles(x, w: QTensor, *, transposed: bool, tile: int):
    if w.double:  # second scales are numbered over the whole weight
        w = dataclasses.replace(w, scale=scales(w), nested=None, offset=None)
    axis, (k, n) = (0 if transposed else 1), w.shape

    def part(array, at, per):
        """The tile's share of an array that has `per` rows of w in one of its own."""
        along = axis if axis == 0 else array.ndim - 1
        size = tile // per if axis == 0 else tile
        return jax.lax.dynamic_slice_in_dim(array, at * size, size, along)

    def one(at, y):
        per = {"packed": w.per_byte}
        if w.scale.shape[0] > 1 if transposed else not w.by_row:  # else every tile's
            per |= {"scale": w.group, "low": w.group}
        arrays = {name: part(a, at, p) for name, p in per.items() if (a := getattr(w, name)) is not None}
        own = _whole(x, dataclasses.replace(w, **arrays), transposed=transposed)
        return jax.lax.dynamic_update_slice_in_dim(y, own, at * tile, 1)

    width = k if transposed else n
    # zeros that hang on the weight: else the compiler keeps some for all layers and products, and copies them for each;
    # and on x: else they lie there, as large as y, before it is made
    x, w, zero = jax.lax.optimization_barrier((x, w, jnp.zeros((), x.dtype)))
    return jax.lax.fori_loop(0, width // tile, one, jnp.broadcast_to(zero, (x.shape[0], width)))
