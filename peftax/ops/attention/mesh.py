"""Attention on a mesh: each device its own rows, heads and queries, with all the keys that these may see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from peftax.ops import batch
from peftax.ops.attention.where import Where


def by_parts(
    attend: Callable[..., jax.Array],
    q_BxTxNxH: jax.Array,
    k_BxKxSxH: jax.Array,
    v_BxKxSxH: jax.Array,
    where: Where,
    *,
    window: int | jax.Array | None,
    in_order: bool,
) -> jax.Array:
    """`attend` by parts, as `where.rows` says that the batch lies.

      rows     over the mesh axes of the batch's rows
      queries  over those of its tokens; keys and values are gathered along them, dk and dv are scattered again
      heads    over the other axes, where these divide the heads of queries, and either divide the key heads or are a
               multiple of them: then a device takes the one key head that its queries share

    With a cache (not in_order), and where the batch does not divide, attention is XLA's to split.

    Args:
      attend: attention on one device; it takes the arguments that follow.
      k_BxKxSxH, v_BxKxSxH: S is T, or more: the keys before a row's own, which all its devices have.
      The others: as in `ops.attention.attention`.

    Returns:
      [B, T, N, H].
    """
    rows, where = where.rows, dataclasses.replace(where, rows=None)
    lead = () if rows is None or not in_order else batch.lead(rows, q_BxTxNxH)
    if rows is None or not lead or lead[0] is None:
        return attend(q_BxTxNxH, k_BxKxSxH, v_BxKxSxH, where, window=window, in_order=in_order)
    row, tokens, *_ = lead
    mesh, (t, n), (kv, s) = rows.mesh, q_BxTxNxH.shape[1:3], k_BxKxSxH.shape[1:3]
    own = (*batch.row_axes(rows), *batch.token_axes(rows))
    others = tuple(a for a in mesh.axis_names if a not in own and mesh.shape[a] > 1)
    parts = batch.parts(mesh, others)
    heads, kv_heads = (others if split else None for split in splits(n, kv, parts))
    gathered = tokens if s == t else None
    traced = (window,) if isinstance(window, jax.Array) else ()

    def each(q, k, v, where, *traced):
        if heads and not kv_heads:
            mine = jax.lax.axis_index(heads) * kv // parts
            k, v = (jax.lax.dynamic_slice_in_dim(x, mine, 1, axis=1) for x in (k, v))
        if gathered:
            k, v = (jax.lax.all_gather(x, gathered, axis=2, tiled=True) for x in (k, v))
        first = None  # a device's queries are not the last of the keys: their positions say which keys are later
        if tokens:
            first = k.shape[2] - t + jax.lax.axis_index(tokens) * q.shape[1]
        return attend(q, k, v, where, window=traced[0] if traced else window, in_order=not tokens, first=first)

    of_q, of_k = P(row, tokens, heads), P(row, kv_heads, gathered)
    lies = P(row, tokens), P(row, tokens), P(row, None), P(row, None)
    of_where = Where(*lies, front=where.front)  # pyright: ignore[reportArgumentType]
    given = (q_BxTxNxH, k_BxKxSxH, v_BxKxSxH, where, *traced)
    specs = (of_q, of_k, of_k, of_where, P())[: len(given)]
    return jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=of_q, check_vma=False)(*given)


def splits(heads: int, kv_heads: int, parts: int) -> tuple[bool, bool]:
    """Are heads, and are key heads, split over so many devices?"""
    split = parts > 1 and heads % parts == 0 and (kv_heads % parts == 0 or parts % kv_heads == 0)
    return split, split and kv_heads % parts == 0
