"""The product of a packed weight in plain XLA: what other kernels are held against, and what runs where none fits."""

from __future__ import annotations

import jax

from peftax.ops.qtensor import QTensor, dense


def product(x_MxK: jax.Array, w: QTensor, *, transposed: bool = False) -> jax.Array:
    """x @ dense(w), or x @ dense(w)ᵀ: the weight's numbers live as long as the product takes.

    The product contracts [groups, group] instead of their product K: XLA for TPU then fuses the scales into it.

    Args:
      x_MxK: [M, K]; [M, N] if transposed.
      w: [K, N].

    Returns:
      [M, N], or [M, K] if transposed, in the dtype of x.
    """
    numbers = dense(w.astype(x_MxK.dtype))
    if transposed:
        return jax.lax.dot_general(x_MxK, numbers, (((1,), (1,)), ((), ())))
    k, n = w.shape
    x = x_MxK.reshape(-1, k // w.group, w.group)
    return jax.lax.dot_general(x, numbers.reshape(k // w.group, w.group, n), (((1, 2), (0, 1)), ((), ())))
