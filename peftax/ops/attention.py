"""Attention whose mask is data: positions and segments, never the ids."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

EVERYWHERE = -1  # a segment that all others see


@dataclasses.dataclass(frozen=True)
class Where:
    """Positions and segments of queries and keys, int32 [B, T] and [B, S]; a pytree. Segment 0 is padding, a
    negative one (EVERYWHERE) is seen by every segment.
    """

    q_positions: jax.Array
    q_segments: jax.Array
    k_positions: jax.Array
    k_segments: jax.Array


jax.tree_util.register_dataclass(Where, data_fields=[f.name for f in dataclasses.fields(Where)], meta_fields=[])


def visible(where: Where, window: int | None = None) -> jax.Array:
    """Which keys each query sees: of its segment or of a common one, not later, not `window` or more behind.

    Returns:
      bool [B, T, S].
    """
    q_pos, k_pos = where.q_positions[:, :, None], where.k_positions[:, None, :]
    q_seg, k_seg = where.q_segments[:, :, None], where.k_segments[:, None, :]
    mask = ((q_seg == k_seg) & (k_seg != 0) | (k_seg < 0)) & (k_pos <= q_pos)
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
