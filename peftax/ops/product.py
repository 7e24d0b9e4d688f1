"""The product of a frozen weight: the one place that knows how a weight is stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w over the last axis of x; integer x takes rows of w.

      y[..., n] = sum_k x[..., k] w[k, n]      or      y[..., n] = w[x[...], n]

    Args:
      x: [..., K] floating, or [...] integer row numbers in [0, K).
      w: [K, N].

    Returns:
      [..., N] in the dtype of w (rows) or of the promoted product.

    Raises:
      ValueError: the contracted sizes differ.
    """
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.take(w, x, axis=0)
    if x.shape[-1] != w.shape[0]:
        raise ValueError(f"matmul: x {x.shape} does not contract with w {w.shape}; want x[-1] == w[0]")
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def linear(x: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
    """matmul(x, w) + b, with b [N] or None."""
    y = matmul(x, w)
    return y if b is None else y + b.reshape((1,) * (y.ndim - 1) + (-1,))
