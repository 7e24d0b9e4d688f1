"""The product of a frozen weight: the one place that knows how a weight is stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from peftax.ops import quantized
from peftax.ops.qtensor import QTensor


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w over the last axis of x; integer x takes rows of w.

      y[..., n] = sum_k x[..., k] w[k, n]      or      y[..., n] = w[x[...], n]

    Args:
      x: [..., K] floating, or [...] integer row numbers in [0, K).
      w: [K, N], an array or a QTensor.

    Returns:
      [..., N] in the dtype of w (rows) or of the promoted product.

    Raises:
      ValueError: the contracted sizes differ.
    """
    if isinstance(w, QTensor):
        return (quantized.rows if jnp.issubdtype(x.dtype, jnp.integer) else quantized.product)(x, w)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.take(w, x, axis=0)
    if x.shape[-1] != w.shape[0]:
        raise ValueError(f"matmul: x {x.shape} does not contract with w {w.shape}; want x[-1] == w[0]")
    return _dot(x, w) if x.dtype == w.dtype == jnp.bfloat16 else _contract(x, w, ((x.ndim - 1,), (0,)))


def linear(x: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
    """matmul(x, w) + b, with b [N] or None."""
    y = matmul(x, w)
    return y if b is None else y + last(b, y)


def kept(y: jax.Array) -> jax.Array:
    """y, named so that a backbone's remat "dots" keeps it for the backward pass."""
    return checkpoint_name(y, "product")


def _contract(x: jax.Array, y: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """The product of x and y over these axes of each; of bf16 the sum is f32, then rounded.

    XLA for CPU uses a processor's bf16 instructions where the sum stays f32, else it widens x and y: 400 against
    200 GFLOP/s (run, experiments/speed). Others sum in f32 anyway, and write less when the product itself rounds.
    """
    dims = (axes, ((), ()))
    if not x.dtype == y.dtype == jnp.bfloat16:
        return jax.lax.dot_general(x, y, dims)

    def rounded_after(x, y):
        return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32).astype(jnp.bfloat16)

    def rounded(x, y):
        return jax.lax.dot_general(x, y, dims)

    return jax.lax.platform_dependent(x, y, cpu=rounded_after, default=rounded)


@jax.custom_vjp
def _dot(x, w):
    """x @ w, with slopes that are products of bf16 too: the transpose of a sum in f32 would not be."""
    return _contract(x, w, ((x.ndim - 1,), (0,)))


def _dot_forward(x, w):
    return _dot(x, w), (x, w)


def _dot_backward(saved, dy):
    x, w = saved
    return _contract(dy, w, ((dy.ndim - 1,), (1,))), _over_rows(x, dy)


_dot.defvjp(_dot_forward, _dot_backward)


def last(v: jax.Array, x: jax.Array) -> jax.Array:
    """v [N] with as many axes as x [..., N], to be added to it or multiplied with it."""
    return v.reshape((1,) * (x.ndim - 1) + (-1,))


@jax.custom_vjp
def narrow(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w for a trainable w with one short side, as LoRA's factors have.

      y = x w        dx = dy wᵀ        dw = xᵀ dy, summed over all leading axes

    The same numbers as matmul(x, w). Its gradient of w keeps the short side in front: XLA on CPU
    computes the other order, to which it simplifies the plain product, up to eight times slower
    (experiments/speed).

    Args:
      x: [..., K] floating.
      w: [K, N].

    Returns:
      [..., N].
    """
    return matmul(x, w)


def _narrow_forward(x, w):
    return matmul(x, w), (x, w)


def _narrow_backward(saved, dy):
    x, w = saved
    return _contract(dy, w, ((dy.ndim - 1,), (1,))), _gradient_of_w(x, dy)


def _over_rows(x, dy):
    lead = tuple(range(x.ndim - 1))
    return _contract(x, dy, (lead, lead))


@jax.custom_batching.custom_vmap
def _gradient_of_w(x, dy):
    if x.shape[-1] <= dy.shape[-1]:
        return jax.lax.optimization_barrier(_over_rows(x, dy))
    # the barrier keeps XLA from folding the transpose back into the product
    return jax.lax.optimization_barrier(_over_rows(dy, x)).T


@_gradient_of_w.def_vmap
def _gradient_of_ws(size, mapped, x, dy):
    """Many at once (experts): the plain product; on a batched transpose behind a barrier XLA for CPU aborts."""
    axes = tuple(0 if m else None for m in mapped)
    return jax.vmap(_over_rows, axes)(x, dy), True


narrow.defvjp(_narrow_forward, _narrow_backward)
