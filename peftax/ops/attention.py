"""Attention whose mask is data: positions and segments, never the ids."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

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


def attention(
    q_BxTxNxH: jax.Array,
    k_BxKxSxH: jax.Array,
    v_BxKxSxH: jax.Array,
    mask_BxTxS: jax.Array,
    *,
    in_order: bool = False,
    block: int = 64,
) -> jax.Array:
    """softmax(q kᵀ / √H + mask) v with grouped heads (K divides N); softmax in f32.

    The queries of one key head stand together in one product, and keys lie as a cache holds them: on CPU, forward and
    backward take half the time of `jax.nn.dot_product_attention`. Nothing of [T, S] is kept for the backward pass: it
    makes the probabilities again from each query's maximum and sum. A query that sees no key (padding) gets a finite,
    meaningless row.

    Args:
      in_order: the last T keys are the tokens of the queries, and none sees a key behind its own, whatever the mask
        says: `block` queries at a time then meet only the keys up to the last of theirs.
      block: queries at a time, if in_order; more where there would be over four blocks.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    t, s = mask_BxTxS.shape[1:]
    if in_order:
        block = max(block, -(-t // 4))  # more blocks compile for long and save little
        mask_BxTxS = mask_BxTxS & jnp.tril(jnp.ones((1, t, s), bool), s - t)
    return _attention(block if in_order else t, q_BxTxNxH, k_BxKxSxH, v_BxKxSxH, mask_BxTxS)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(block, q, k, v, mask):
    return _forward(block, q, k, v, mask)[0]


def _forward(block, q, k, v, mask):
    q = _grouped(q * (q.shape[-1] ** -0.5), k.shape[1])
    ys, tops, sums = [], [], []
    for rows, seen in _blocks(block, q.shape[3], k.shape[2]):
        scores = _scores(q[:, :, :, rows], k[:, :, seen], mask[:, rows, seen])
        tops.append(jnp.max(scores, axis=-1, keepdims=True))
        p = jnp.exp(scores - tops[-1])
        sums.append(jnp.sum(p, axis=-1, keepdims=True))
        p = (p / sums[-1]).astype(q.dtype)
        ys.append(_product("bkqs,bksh->bkqh", p, v[:, :, seen]))
    y, top, total = (jnp.concatenate(x, axis=3) for x in (ys, tops, sums))
    y, top, total = (checkpoint_name(x, "attention") for x in (y, top, total))
    return _ungrouped(y), (q, k, v, mask, y, top, total)


def _backward(block, kept, dy):
    q, k, v, mask, y, top, total = kept
    dy = _grouped(dy, k.shape[1])
    inner = jnp.sum(dy.astype(jnp.float32) * y, axis=-1, keepdims=True)  # Σ_s p dp, from the short side
    dqs, dk, dv = [], jnp.zeros_like(k), jnp.zeros_like(v)
    for rows, seen in _blocks(block, q.shape[3], k.shape[2]):
        q_here, d_here = q[:, :, :, rows], dy[:, :, :, rows]
        scores = _scores(q_here, k[:, :, seen], mask[:, rows, seen])
        p = jnp.exp(scores - top[:, :, :, rows]) / total[:, :, :, rows]
        dp = _product("bkqh,bksh->bkqs", d_here, v[:, :, seen], jnp.float32)
        ds = (p * (dp - inner[:, :, :, rows])).astype(q.dtype)
        dqs.append(_product("bkqs,bksh->bkqh", ds, k[:, :, seen]))
        dk = dk.at[:, :, seen].add(_product_of_rows(ds, q_here))
        dv = dv.at[:, :, seen].add(_product_of_rows(p.astype(q.dtype), d_here))
    dq = _ungrouped(jnp.concatenate(dqs, axis=3)) * (q.shape[-1] ** -0.5)
    return dq, dk, dv, None


_attention.defvjp(_forward, _backward)


def _blocks(block: int, t: int, s: int) -> list[tuple[slice, slice]]:
    """The queries of every block, and the keys that they may see."""
    if block >= t:
        return [(slice(0, t), slice(0, s))]
    ranges = [(at, min(at + block, t)) for at in range(0, t, block)]
    return [(slice(at, end), slice(0, s - t + end)) for at, end in ranges]


def _scores(q, k, mask):
    scores = _product("bkqh,bksh->bkqs", q, k, jnp.float32)
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _product(formula, x, w, dtype=None):
    """x [B, K, G, T, ...] with w of every key head: the G query heads in one product."""
    b, k, g, t, _ = x.shape
    y = jnp.einsum(formula, x.reshape(b, k, g * t, -1), w, preferred_element_type=dtype)
    return y.reshape(b, k, g, t, -1)


def _product_of_rows(x, y):
    """Σ over the queries of all G heads of x [B, K, G, T, S] and y [B, K, G, T, H]."""
    b, k, g, t, s = x.shape
    return jnp.einsum("bkqs,bkqh->bksh", x.reshape(b, k, g * t, s), y.reshape(b, k, g * t, -1))


def _grouped(x_BxTxNxH, kv):
    b, t, n, h = x_BxTxNxH.shape
    return x_BxTxNxH.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]


def _ungrouped(x_BxKxGxTxH):
    b, k, g, t, h = x_BxKxGxTxH.shape
    return x_BxKxGxTxH.transpose(0, 3, 1, 2, 4).reshape(b, t, k * g, h)
