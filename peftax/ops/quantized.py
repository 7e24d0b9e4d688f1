"""The product of a packed weight as a function: its gradient, its batching, its place on a mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from peftax.ops import batch, kernels
from peftax.ops.qtensor import QTensor, check, dense, scales


def product(x: jax.Array, w: QTensor) -> jax.Array:
    """x @ w for a weight in few bits, which has no gradient.

      y[..., n] = sum_k x[..., k] dense(w)[k, n]        dx = dy dense(w)ᵀ

    Where the weight says how a batch lies on a mesh (`w.rows`), every device multiplies its own tokens with its own
    part of the weight. Parts along mesh axes that split the batch are gathered, packed; parts along others stay:
    split columns give split columns of y, split rows (K) partial sums, which are added up over that axis, and
    in dx the other way round.

    Args:
      x: [..., K] floating.
      w: [K, N].

    Returns:
      [..., N] in the dtype of x.

    Raises:
      ValueError: the contracted sizes differ, or the weight's arrays do not belong together.
    """
    check(w)
    if x.shape[-1] != w.shape[0]:
        raise ValueError(f"product: x {x.shape} does not contract with w {w.shape}; want x[-1] == w[0]")
    return _product(x, w)


@jax.custom_vjp
def _product(x, w):
    return _forward(x, w)


@jax.custom_batching.custom_vmap
def _forward(x, w):
    return _on_mesh(x, w, transposed=False)


@jax.custom_batching.custom_vmap
def _transposed(dy, w):
    return _on_mesh(dy, w, transposed=True)


def _on_mesh(x, w: QTensor, *, transposed: bool):
    """Every device's own tokens by its own part of the weight; without a mesh the product."""
    rows, (of_k, of_n) = w.rows, _stay(w)
    w = dataclasses.replace(w, rows=None, split=(None, None))
    if rows is None:
        return kernels.product(x, w, transposed=transposed)
    blocks = w.scale.shape[0]
    of_blocks = of_k if blocks > 1 else None  # one group a column is every device's

    def each(x, w):
        if w.double:  # its scales are numbered over the whole weight
            at = [
                jax.lax.axis_index(a) * n if a else 0
                for a, n in zip((of_blocks, of_n), w.scale.shape[::2], strict=True)
            ]
            w = dataclasses.replace(w, scale=scales(w, at=at, blocks=blocks), nested=None, offset=None)
        y = kernels.product(x, w, transposed=transposed)
        return jax.lax.psum(y, inner) if inner else y

    inner, outer = (of_n, of_k) if transposed else (of_k, of_n)
    lead = batch.lead(rows, x)
    lies = {"packed": P(of_k, of_n), "scale": P(of_blocks, None, of_n), "low": P(of_blocks, None, of_n)}
    of_w = jax.tree_util.tree_map_with_path(lambda path, _: lies.get(path[0].name, P()), w)
    specs = {"in_specs": (P(*lead, inner), of_w), "out_specs": P(*lead, outer)}
    return jax.shard_map(each, mesh=rows.mesh, check_vma=False, **specs)(x, w)


def _stay(w: QTensor) -> tuple[Any, Any]:
    """The mesh axes over which K and N stay split in products: not the batch's own, and none that cuts a group."""
    if w.rows is None:
        return None, None
    own = (*batch.row_axes(w.rows), *batch.token_axes(w.rows))
    of_k, of_n = (tuple(a for a in jax.tree.leaves(axes) if a not in own) for axes in w.split)
    blocks, parts = w.scale.shape[0], batch.parts(w.rows.mesh, of_k)
    if w.packed.shape[0] % parts or (blocks > 1 and blocks % parts):
        of_k = ()
    if w.shape[1] % batch.parts(w.rows.mesh, of_n):
        of_n = ()
    return of_k or None, of_n or None


@_forward.def_vmap
def _forwards(size, mapped, x, w):
    """Members of one weight are more rows of one product: the weight is read once."""
    if not any(jax.tree.leaves(mapped[1])) and mapped[0]:
        return _as_rows(_forward, x, w), True
    return jax.vmap(_reference, _axes(mapped), axis_size=size)(x, w), True


@_transposed.def_vmap
def _transposeds(size, mapped, dy, w):
    if not any(jax.tree.leaves(mapped[1])) and mapped[0]:
        return _as_rows(_transposed, dy, w), True
    each = lambda dy, w: jnp.matmul(dy, dense(w.astype(dy.dtype)).T)  # noqa: E731
    return jax.vmap(each, _axes(mapped), axis_size=size)(dy, w), True


def _as_rows(product, x, w):
    """Members in front become rows; on a mesh behind the batch's axes, which come first there."""
    if w.rows is None or x.ndim < 3:
        return product(x, w)
    return jnp.moveaxis(product(jnp.moveaxis(x, 0, -2), w), -2, 0)


def _reference(x, w):
    return jnp.matmul(x, dense(w.astype(x.dtype)))


def _axes(mapped):
    return jax.tree.map(lambda m: 0 if m else None, mapped)


_product.defvjp(lambda x, w: (_forward(x, w), w), lambda w, dy: (_transposed(dy, w), None))
