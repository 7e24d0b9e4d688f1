"""A normal start: A ~ N(0, 1/rank²), B zero; the base stays.

Source: https://arxiv.org/abs/2106.09685, section 4.1 (the variance is not given there); the width is Hugging Face
PEFT's `init_lora_weights="gaussian"`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MOVES = False


def gaussian(key: jax.Array, w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """(a [in, rank], b [rank, out]) of w [in, out]; scale has no part in it."""
    n_in, n_out = w.shape
    return jax.random.normal(key, (n_in, rank)) / rank, jnp.zeros((rank, n_out))
