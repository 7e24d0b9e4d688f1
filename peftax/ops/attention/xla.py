"""Attention in plain XLA, some queries at a time: what other forms are held against, and what runs where none fits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from peftax.ops.attention.where import Where, sees

SCORES = 32 << 20  # bytes of f32 scores that exist at a time, of all rows and heads together
FEWEST = 16  # queries at a time, however many scores these have


class Steps(NamedTuple):
    """How the queries are gone through: static."""

    in_order: bool
    block: int  # queries of a block; the blocks of rows in order each meet only the keys up to their last
    rows: int  # queries of a block that are there at a time


def attention(
    q_BxTxNxH: jax.Array,
    k_BxKxSxH: jax.Array,
    v_BxKxSxH: jax.Array,
    where: Where,
    *,
    window: int | jax.Array | None = None,
    in_order: bool = False,
    block: int = 64,
    scores: int = SCORES,
) -> jax.Array:
    """`ops.attention.attention`, with a backward pass of its own.

    The queries of one key head stand together in one product, and keys lie as a cache holds them: on CPU, forward and
    backward take half the time of `jax.nn.dot_product_attention`. Nothing of [T, S] is kept for the backward pass: it
    makes the probabilities again from each query's maximum and sum.

    Args:
      block: queries at a time, if in_order; more where there would be over four blocks.
      scores: bytes of f32 scores above which a block's queries come some at a time, one scan for each block.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    (b, t, n, _), s = q_BxTxNxH.shape, k_BxKxSxH.shape[2]
    rows = max(FEWEST, scores // (4 * b * n * s))
    block = max(block, -(-t // 4)) if in_order else t  # more blocks compile for long and save little
    if rows < block < t:
        block = -(-block // rows) * rows
    window = None if window is None else jnp.asarray(window, jnp.int32)
    return _attention(Steps(in_order, block, rows), q_BxTxNxH, k_BxKxSxH, v_BxKxSxH, where, window)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(steps, q, k, v, where, window):
    return _forward(steps, q, k, v, where, window)[0]


def _forward(steps, q, k, v, where, window):
    q = _grouped(q * (q.shape[-1] ** -0.5), k.shape[1])
    found = []
    for queries, seen, here in _blocks(steps, where, k.shape[2]):
        keys, values = k[:, :, seen], v[:, :, seen]

        def attend(_, own, here=here, keys=keys, values=values):
            q, at, low = _bound(*own)
            scores = _scores(q, keys, at, here, window, low)
            top = jnp.max(scores, axis=-1, keepdims=True)
            p = jnp.exp(scores - top)
            total = jnp.sum(p, axis=-1, keepdims=True)
            return None, (_product("bkqs,bksh->bkqh", (p / total).astype(q.dtype), values), top, total)

        own = (q[:, :, :, queries], _of(queries, where))
        found.append(_in_turn(attend, None, own, steps.rows)[1])
    y, top, total = (jnp.concatenate(x, axis=3) for x in zip(*found, strict=True))
    y, top, total = (checkpoint_name(x, "attention") for x in (y, top, total))
    return _ungrouped(y), (q, k, v, where, window, y, top, total)


def _backward(steps, kept, dy):
    q, k, v, where, window, y, top, total = kept
    dy, where, zero = jax.lax.optimization_barrier((_grouped(dy, k.shape[1]), where, jnp.float32(0)))
    inner = jnp.sum(dy.astype(jnp.float32) * y, axis=-1, keepdims=True)  # Σ_s p dp, from the short side
    dqs, dk, dv = [], jnp.broadcast_to(zero, k.shape), jnp.broadcast_to(zero, v.shape)
    for queries, seen, here in _blocks(steps, where, k.shape[2]):
        keys, values = k[:, :, seen], v[:, :, seen]

        def back(slopes, own, here=here, keys=keys, values=values):
            dk, dv = slopes
            (q, dy, top, total, inner), at, low = _bound(*own)
            p = jnp.exp(_scores(q, keys, at, here, window, low) - top) / total
            dp = _product("bkqh,bksh->bkqs", dy, values, jnp.float32)
            ds = (p * (dp - inner)).astype(q.dtype)
            dq = _product("bkqs,bksh->bkqh", ds, keys)
            return (dk + _product_of_rows(ds, q), dv + _product_of_rows(p.astype(q.dtype), dy)), dq

        own = [x[:, :, :, queries] for x in (q, dy, top, total, inner)], _of(queries, where)
        slopes = (dk[:, :, seen], dv[:, :, seen])
        slopes, dq = _in_turn(back, slopes, own, steps.rows)
        dqs.append(dq)
        dk, dv = (x.at[:, :, seen].set(new) for x, new in zip((dk, dv), slopes, strict=True))
    dq = _ungrouped(jnp.concatenate(dqs, axis=3)) * (q.shape[-1] ** -0.5)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attention.defvjp(_forward, _backward)


def _blocks(steps: Steps, where: Where, s: int) -> list[tuple[slice, slice, tuple[jax.Array, ...]]]:
    """The queries of every block, the keys that they may see, and these keys' [B, 1, 1, 1, S] numbers of `_of`."""
    t = where.q_positions.shape[1]
    ends = [min(at + steps.block, t) for at in range(0, t, steps.block)]
    blocks = []
    for at, end in zip([0, *ends], ends, strict=False):
        seen = slice(0, s - t + end if steps.in_order else s)
        number = jnp.arange(seen.stop)[None] - (s - t) if steps.in_order else jnp.zeros((1, s), jnp.int32)
        keys = (where.k_positions[:, seen], where.k_segments[:, seen], number)
        blocks.append((slice(at, end), seen, tuple(x[:, None, None, None] for x in keys)))
    return blocks


def _of(queries: slice, where: Where) -> tuple[jax.Array, ...]:
    """Positions, segments and numbers of these queries, [B, 1, 1, T, 1] each."""
    numbers = jnp.arange(queries.start, queries.stop)[None]
    own = (where.q_positions[:, queries], where.q_segments[:, queries], numbers)
    return tuple(x[:, None, None, :, None] for x in own)


def _in_turn(step: Callable, carry: Any, queries: Any, rows: int) -> tuple[Any, Any]:
    """step(carry, queries) -> (carry, results), `rows` queries (axis 3) at a time, the results put together again."""
    t = jax.tree.leaves(queries)[0].shape[3]
    whole = t // rows if t >= 2 * rows else 0
    results = []
    if whole:

        def some(carry, at):
            return step(carry, jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, rows, 3), queries))

        def joined(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], whole * rows, *x.shape[5:])

        carry, found = jax.lax.scan(some, carry, rows * jnp.arange(whole))
        results.append(jax.tree.map(joined, found))
    if rest := t - whole * rows:
        carry, found = step(carry, jax.tree.map(lambda x: x[:, :, :, t - rest :], queries))
        results.append(found)
    if len(results) == 1:
        return carry, results[0]
    return carry, jax.tree.map(lambda first, rest: jnp.concatenate((first, rest), axis=3), *results)


def _bound(arrays: Any, at: Any) -> tuple[Any, Any, jax.Array]:
    """These and the score of what is not seen, bound to one another: else masks, which no layer changes, are made
    once for all layers, whole."""
    return jax.lax.optimization_barrier((arrays, at, jnp.finfo(jnp.float32).min))


def _scores(q, k, at, here, window, low):
    scores = _product("bkqh,bksh->bkqs", q, k, jnp.float32)
    (q_position, q_segment, q_number), (k_position, k_segment, k_number) = at, here
    mask = sees(q_position, q_segment, k_position, k_segment, window) & (k_number <= q_number)
    return jnp.where(mask, scores, low)


def _product(formula, x, w, dtype=None):
    """x [B, K, G, T, ...] with w of every key head: the G query heads in one product."""
    b, k, g, t, _ = x.shape
    y = jnp.einsum(formula, x.reshape(b, k, g * t, -1), w, preferred_element_type=dtype)
    return y.reshape(b, k, g, t, -1)


def _product_of_rows(x, y):
    """Σ over the queries of all G heads of x [B, K, G, T, S] and y [B, K, G, T, H], in f32."""
    b, k, g, t, s = x.shape
    x, y = x.reshape(b, k, g * t, s), y.reshape(b, k, g * t, -1)
    return jnp.einsum("bkqs,bkqh->bksh", x, y, preferred_element_type=jnp.float32)


def _grouped(x_BxTxNxH, kv):
    b, t, n, h = x_BxTxNxH.shape
    return x_BxTxNxH.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]


def _ungrouped(x_BxKxGxTxH):
    b, k, g, t, h = x_BxKxGxTxH.shape
    return x_BxKxGxTxH.transpose(0, 3, 1, 2, 4).reshape(b, t, k * g, h)
