"""Attention whose mask is data: positions and segments, never the ids."""

from __future__ import annotations

import functools
import warnings

import jax

from peftax.ops.attention import mesh, xla
from peftax.ops.attention.where import EVERYWHERE, Where, visible

__all__ = ["EVERYWHERE", "FORMS", "Where", "attention", "visible"]
FORMS = ("auto", "xla", "splash")  # "auto" is XLA's until a timing on a device says otherwise


def attention(
    q_BxTxNxH: jax.Array,
    k_BxKxSxH: jax.Array,
    v_BxKxSxH: jax.Array,
    where: Where,
    *,
    window: int | jax.Array | None = None,
    in_order: bool = False,
    form: str = "auto",
) -> jax.Array:
    """softmax(q kᵀ / √H + mask) v with grouped heads (K divides N); softmax in f32.

    Where `where` says how the batch lies on a mesh, each device makes its own part (`mesh.py`).

    The mask is `visible(where, window)`, and never made whole. A query that sees no key (padding) gets a finite,
    meaningless row.

    Args:
      where: positions and segments, [B, T] of the queries and [B, S] of the keys.
      window: how far back a query sees; None: without end.
      in_order: the last T keys are the tokens of the queries, and none sees a key behind its own, whatever `where`
        says.
      form: one of FORMS. "splash" runs on TPU alone. What it does not take (`splash.refusal`) XLA makes, with one
        warning; without one what has a cache, and what `inject` tells nothing (`where.front`).

    Returns:
      [B, T, N, H] in the dtype of q.

    Raises:
      ValueError: the shapes do not belong together.
    """
    (b, t, n, h), (_, kv, s, _) = q_BxTxNxH.shape, k_BxKxSxH.shape
    if k_BxKxSxH.shape != (b, kv, s, h) or v_BxKxSxH.shape[:3] != (b, kv, s) or n % kv:
        raise ValueError(
            f"attention: q {q_BxTxNxH.shape} wants k and v [{b}, heads that divide {n}, keys, {h}]; "
            f"they are {k_BxKxSxH.shape} and {v_BxKxSxH.shape}"
        )
    if where.q_positions.shape[1] != t or where.k_positions.shape[1] != s:
        raise ValueError(
            f"attention: {t} queries and {s} keys, but `where` holds {where.q_positions.shape[1]} and "
            f"{where.k_positions.shape[1]}"
        )
    attend = functools.partial(_attend, form)
    if where.rows is None:
        return attend(q_BxTxNxH, k_BxKxSxH, v_BxKxSxH, where, window=window, in_order=in_order)
    return mesh.by_parts(attend, q_BxTxNxH, k_BxKxSxH, v_BxKxSxH, where, window=window, in_order=in_order)


def _attend(form: str, q, k, v, where: Where, *, window, in_order: bool, first: jax.Array | None = None) -> jax.Array:
    """On one device. `first`: of a part of a row in order, its first query's number among the keys."""
    if form == "splash" and where.front is not None and (in_order or first is not None):
        from peftax.ops.attention import splash  # Pallas takes its time to load

        why_not = splash.refusal(q.shape[-1], k.shape[2], where.front, window)
        if why_not is None:
            return splash.attention(q, k, v, where, window=window, first=first)
        _warn(why_not)
    return xla.attention(q, k, v, where, window=window, in_order=in_order)


@functools.cache
def _warn(why_not: str) -> None:
    warnings.warn(f"attention 'splash': {why_not}; XLA makes it", stacklevel=2)
