"""Attention whose mask is data: positions and segments, never the ids."""

from __future__ import annotations

import jax


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


def attention(q_BxTxNxH: jax.Array, k_BxSxKxH: jax.Array, v_BxSxKxH: jax.Array, mask_BxTxS: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √H + mask) v with grouped heads (K divides N); softmax in f32.

    A query that sees no key (padding) gets a finite, meaningless row.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    return jax.nn.dot_product_attention(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, mask=mask_BxTxS[:, None], implementation="xla")
