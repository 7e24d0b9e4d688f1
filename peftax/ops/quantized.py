"""The product of a packed weight as a function: its gradient, its batching, its place on a mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from peftax.ops import kernels
from peftax.ops.qtensor import QTensor, dense


def product(x: jax.Array, w: QTensor) -> jax.Array:
    """x @ w for a weight in few bits, which has no gradient.

      y[..., n] = sum_k x[..., k] dense(w)[k, n]        dx = dy dense(w)ᵀ

    Where the weight says how a batch's rows lie on a mesh (`w.rows`), every device multiplies its own rows, and what
    moves between devices is the packed weight.

    Args:
      x: [..., K] floating.
      w: [K, N].

    Returns:
      [..., N] in the dtype of x.

    Raises:
      ValueError: the contracted sizes differ.
    """
    if x.shape[-1] != w.shape[0]:
        raise ValueError(f"product: x {x.shape} does not contract with w {w.shape}; want x[-1] == w[0]")
    if w.rows is None or x.ndim < 2 or x.shape[0] % w.rows.num_devices:
        return _product(x, dataclasses.replace(w, rows=None))
    rows = PartitionSpec(*w.rows.spec, *(None,) * (x.ndim - len(w.rows.spec)))
    each = jax.shard_map(_product, mesh=w.rows.mesh, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False)
    return each(x, dataclasses.replace(w, rows=None))


@jax.custom_vjp
def _product(x, w):
    return _forward(x, w)


@jax.custom_batching.custom_vmap
def _forward(x, w):
    return kernels.product(x, w, transposed=False)


@jax.custom_batching.custom_vmap
def _transposed(dy, w):
    return kernels.product(dy, w, transposed=True)


@_forward.def_vmap
def _forwards(size, mapped, x, w):
    """Members of one weight are more rows of one product: the weight is read once."""
    if not any(jax.tree.leaves(mapped[1])) and mapped[0]:
        return _forward(x, w), True
    return jax.vmap(_reference, _axes(mapped), axis_size=size)(x, w), True


@_transposed.def_vmap
def _transposeds(size, mapped, dy, w):
    if not any(jax.tree.leaves(mapped[1])) and mapped[0]:
        return _transposed(dy, w), True
    each = lambda dy, w: jnp.matmul(dy, dense(w.astype(dy.dtype)).T)  # noqa: E731
    return jax.vmap(each, _axes(mapped), axis_size=size)(dy, w), True


def _reference(x, w):
    return jnp.matmul(x, dense(w.astype(x.dtype)))


def _axes(mapped):
    return jax.tree.map(lambda m: 0 if m else None, mapped)


_product.defvjp(lambda x, w: (_forward(x, w), w), lambda w, dy: (_transposed(dy, w), None))
