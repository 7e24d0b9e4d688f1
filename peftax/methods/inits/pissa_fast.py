"""Fast PiSSA: the principal subspace by a randomized SVD, a few products instead of a whole decomposition.

  Q = orth((W Wᵀ)^4 W Ω),  Ω normal [out, rank + 8];   Qᵀ W = U' S Vᵀ,   U = Q U';   then as PiSSA

Source: https://arxiv.org/abs/2404.02948, section 4.6 ("fast SVD"); the range finder: https://arxiv.org/abs/0909.4061,
algorithm 4.4. Each product is orthonormalized, which keeps f32 apart from rounding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from peftax.methods.inits import padded

MOVES = True
ITERATIONS, MORE = 4, 8


def pissa_fast(key: jax.Array, w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """(a [in, rank], b [rank, out]) of w [in, out]."""
    w = w.astype(jnp.float32)
    q = w @ jax.random.normal(key, (w.shape[1], min(rank + MORE, *w.shape)))
    for _ in range(ITERATIONS):
        q = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ jnp.linalg.qr(q)[0])[0])[0]
    u, s, vt = jnp.linalg.svd(q.T @ w, full_matrices=False)
    root = jnp.sqrt(s[:rank] / scale)
    return padded((q @ u)[:, :rank] * root[None], root[:, None] * vt[:rank], rank)
