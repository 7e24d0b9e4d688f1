"""PiSSA: the principal singular values train, the base keeps the rest (Meng et al., 2024).

  W = U S Vᵀ     a = U_r sqrt(S_r / s),   b = sqrt(S_r / s) V_rᵀ,   base = W - s a b

Source: https://arxiv.org/abs/2404.02948, eq. 2-4; here with LoRA's scale s taken out, as in Hugging Face PEFT.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from peftax.methods.inits import padded

MOVES = True


def pissa(key: jax.Array, w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """(a [in, rank], b [rank, out]) of w [in, out]; key has no part in it."""
    u, s, vt = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[:rank] / scale)
    return padded(u[:, :rank] * root[None], root[:, None] * vt[:rank], rank)
