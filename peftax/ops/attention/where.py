"""Where queries and keys stand, and what follows from it: which keys a query sees."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

EVERYWHERE = -1  # a segment that all others see


@dataclasses.dataclass(frozen=True)
class Where:
    """Positions and segments of queries and keys, int32 [B, T] and [B, S]; a pytree. Segment 0 is padding, a
    negative one (EVERYWHERE) is seen by every segment.

    rows:  how the batch lies on a mesh; `inject` says so.
    front: negative segments are among the first `front` keys alone; `inject` says so. None: nobody does.
    """

    q_positions: jax.Array
    q_segments: jax.Array
    k_positions: jax.Array
    k_segments: jax.Array
    rows: NamedSharding | None = None
    front: int | None = None

    @classmethod
    def both_ways(cls, positions: jax.Array, segments: jax.Array) -> Where:
        """Every token sees all of its segment: no key is later than any query."""
        return cls(positions, segments, jnp.zeros_like(positions), segments)


ARRAYS = ("q_positions", "q_segments", "k_positions", "k_segments")
jax.tree_util.register_dataclass(Where, data_fields=ARRAYS, meta_fields=["rows", "front"])


def visible(where: Where, window: int | jax.Array | None = None) -> jax.Array:
    """Which keys each query sees: of its segment or of a common one, not later, not `window` or more behind.

    Returns:
      bool [B, T, S].
    """
    queries = where.q_positions[:, :, None], where.q_segments[:, :, None]
    return sees(*queries, where.k_positions[:, None], where.k_segments[:, None], window)


def sees(q_positions: Any, q_segments: Any, k_positions: Any, k_segments: Any, window: Any = None) -> jax.Array:
    """`visible` of arrays that broadcast against one another."""
    mask = ((q_segments == k_segments) & (k_segments != 0) | (k_segments < 0)) & (k_positions <= q_positions)
    return mask if window is None else mask & (q_positions - k_positions < window)
