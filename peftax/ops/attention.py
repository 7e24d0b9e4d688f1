"""Attention whose mask is data: positions and segments, never the ids."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def visible(
    q_positions_BxT: jax.Array,
    q_segments_BxT: jax.Array,
    k_positions_BxS: jax.Array,
    k_segments_BxS: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Which keys each query sees: same nonzero segment, not later, not `window` or more behind.

    Returns:
      bool [B, T, S].
    """
    q_pos, k_pos = q_positions_BxT[:, :, None], k_positions_BxS[:, None, :]
    q_seg, k_seg = q_segments_BxT[:, :, None], k_segments_BxS[:, None, :]
    mask = (q_seg == k_seg) & (k_seg != 0) & (k_pos <= q_pos)
    return mask if window is None else mask & (q_pos - k_pos < window)


def attention(q_BxTxNxH: jax.Array, k_BxKxSxH: jax.Array, v_BxKxSxH: jax.Array, mask_BxTxS: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √H + mask) v with grouped heads (K divides N); softmax in f32.

    The queries of one key head stand together in one product, and keys lie as a cache holds them:
    on CPU, forward and backward take half the time of `jax.nn.dot_product_attention`. A query that
    sees no key (padding) gets a finite, meaningless row.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    b, t, n, h = q_BxTxNxH.shape
    k, s = k_BxKxSxH.shape[1:3]
    g = n // k
    q = q_BxTxNxH.reshape(b, t, k, g, h).transpose(0, 2, 3, 1, 4).reshape(b, k, g * t, h)
    scores = jnp.einsum("bkqh,bksh->bkqs", q * (h**-0.5), k_BxKxSxH, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, k, g, t, s)
    scores = jnp.where(mask_BxTxS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    p = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(b, k, g * t, s)
    y = jnp.einsum("bkqs,bksh->bkqh", p, v_BxKxSxH).reshape(b, k, g, t, h)
    return y.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
