"""OLoRA: an orthonormal start from the kernel's QR decomposition (Büyükakyüz, 2024).

  Wᵀ = Q R      b = Q_rᵀ,   a = R_rᵀ,   base = W - s a b

Source: https://arxiv.org/abs/2406.01775, algorithm 1; W is [in, out] here, the paper's is its transpose.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from peftax.methods.inits import padded

MOVES = True


def olora(key: jax.Array, w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """(a [in, rank], b [rank, out]) of w [in, out]; key and scale have no part in it."""
    q, r = jnp.linalg.qr(w.T.astype(jnp.float32))
    return padded(r[:rank].T, q[:, :rank].T, rank)
