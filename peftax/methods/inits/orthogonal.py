"""An orthogonal start: A and B are both away from zero, and their product is zero; the base stays.

  Q = orth(normal [rank, rank]),   a = Z₁ Q[0::2] / 10,   b = Q[1::2]ᵀ Z₂ / 10,   Z normal [in, rank/2], [rank/2, out]

Source: https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation, as Hugging Face PEFT's
`init_lora_weights="orthogonal"`. The rank must be even.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MOVES = False


def orthogonal(key: jax.Array, w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """(a [in, rank], b [rank, out]) of w [in, out]; scale has no part in it."""
    if rank % 2:
        raise ValueError(f"init orthogonal: rank {rank} must be even")
    keys = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (rank, rank)))
    a = jax.random.normal(keys[1], (w.shape[0], rank // 2)) @ q[0::2]
    b = q[1::2].T @ jax.random.normal(keys[2], (rank // 2, w.shape[1]))
    return a / 10, b / 10
