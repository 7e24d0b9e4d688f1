"""LoRA's own start: A uniform, B zero; the base stays (Hu et al., 2021; He et al., 2015).

  a ~ U(±1/sqrt(in)),   b = 0

Source: https://arxiv.org/abs/2106.09685, section 4.1.
Departs: the paper draws A from a Gaussian; the uniform is what microsoft/LoRA and Hugging Face PEFT do
(kaiming_uniform with a = sqrt 5).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

MOVES = False


def kaiming(key: jax.Array, w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """(a [in, rank], b [rank, out]) of w [in, out]; scale has no part in it."""
    n_in, n_out = w.shape
    bound = 1.0 / math.sqrt(n_in)
    return jax.random.uniform(key, (n_in, rank), minval=-bound, maxval=bound), jnp.zeros((rank, n_out))
