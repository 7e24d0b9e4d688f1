"""Attention by JAX's Splash kernels, on TPU: scores never reach the main memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from peftax.ops.attention.where import Where

SIZES = (64, 128)  # of a head
BLOCK = 512  # queries, and keys, of one step
LANES = 128  # of which a block is a multiple
FAR = 1 << 16  # keys whose number fits half an int32


def refusal(size: int, keys: int, front: int, window: int | jax.Array | None) -> str | None:
    """Why these kernels do not make attention of heads of this size over so many keys; None if they may."""
    if size not in SIZES:
        return f"heads of {size} numbers; want {' or '.join(map(str, SIZES))}"
    if isinstance(window, jax.Array):
        return "layers that see differently far"
    if front and window is not None:
        return "virtual tokens and a window"
    if front and keys + LANES > FAR:
        return f"virtual tokens before more than {FAR - LANES:,} keys"
    return None


def attention(
    q_BxTxNxH: jax.Array,
    k_BxKxSxH: jax.Array,
    v_BxKxSxH: jax.Array,
    where: Where,
    *,
    window: int | None = None,
    first: int | jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`ops.attention.attention` of rows in order; its gradient is Splash's own. It keeps the output and its logsumexp.

    A kernel knows a key by its number. So positions have to rise within a segment, and each segment to lie in one
    piece where the first `where.front` keys are seen by all; both hold in packed rows.

    Args:
      first: the first query's number among the keys; None: the queries are the last.

    Returns:
      [B, T, N, H] in the dtype of q. A query that sees no key (padding) gets a finite, meaningless row.

    Source: `jax.experimental.pallas.ops.tpu.splash_attention`.
    """
    t, s = q_BxTxNxH.shape[1], k_BxKxSxH.shape[2]
    first = s - t if first is None else first
    q = _padded((q_BxTxNxH * q_BxTxNxH.shape[-1] ** -0.5).swapaxes(1, 2), LANES, axis=2)
    blocks = max(n for n in range(LANES, BLOCK + 1, LANES) if q.shape[2] % n == 0), min(BLOCK, -(-s // LANES) * LANES)
    k, v = (_padded(x, blocks[1], axis=2) for x in (k_BxKxSxH, v_BxKxSxH))  # behind all that any query sees
    own = first + jnp.arange(q.shape[2], dtype=jnp.int32)
    kernel = _kernel(blocks, own, k.shape[2], window, where.front, interpret)

    def of_row(q, k, v, of_queries, of_keys):
        if where.front:
            fresh = jnp.concatenate([jnp.ones(1, bool), of_keys[1:] != of_keys[:-1]])
            begun = jax.lax.cummax(jnp.where(fresh, jnp.arange(s, dtype=jnp.int32), 0))
            return kernel(begun[jnp.minimum(own, s - 1)] << 16 | own)(q, k, v)
        segments = splash.SegmentIds(_padded(of_queries, LANES), _padded(of_keys, blocks[1]))
        return kernel(own)(q, k, v, segments)

    y = jax.vmap(of_row)(q, k, v, where.q_segments, where.k_segments)
    return y[:, :, :t].swapaxes(1, 2)


def _kernel(blocks: tuple[int, int], own: jax.Array, keys: int, window, front, interpret: bool) -> Callable:
    """What the mask asks of each query -> the kernel, which steps over blocks that no query sees."""
    rows, columns = blocks
    sizes: dict[str, Any] = {f"block_{x}": n for x in ("q", "q_dkv", "q_dq") for n in [rows]}
    sizes |= {f"block_{x}": n for x in ("kv", "kv_compute", "kv_dkv", "kv_dkv_compute", "kv_dq") for n in [columns]}
    of_one_block = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask(blocks)]),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    begins = own[::rows, None]
    at = columns * jnp.arange(keys // columns)[None]
    seen = at < begins + rows
    if window is not None:
        seen &= at + columns > begins - window + 1
    by_key, by_query = (_nearest(seen, axis) for axis in (1, 0))
    settings = {**of_one_block.kwargs, "mask_function": _sees(window, front)}

    def of(numbers: Any) -> SplashAttentionKernel:
        forward, back = (MaskInfo(at[None], None, _small(seen)[None], None, numbers) for at in (by_key, by_query))
        return SplashAttentionKernel(forward, forward, back, **settings)

    return of


def _nearest(seen: jax.Array, axis: int) -> jax.Array:
    """The nearest block along an axis that is seen: what a step fetches."""
    n = seen.shape[axis]
    low = jnp.argmax(seen, axis, keepdims=True)
    high = n - 1 - jnp.argmax(jnp.flip(seen, axis), axis, keepdims=True)
    return _small(jnp.clip(jax.lax.broadcasted_iota(jnp.int32, seen.shape, axis), low, high))


def _small(x: jax.Array) -> jax.Array:
    """The blocks' map lies in scalar memory, of which there is little."""
    return x.astype(jnp.int8 if max(x.shape) <= 128 else jnp.int16)


@functools.cache  # a kernel is known by this function: the same one for the same mask
def _sees(window: int | None, front: int) -> Callable:
    """(what the mask asks of queries, keys' numbers) -> which they see; segments are compared elsewhere, or in here."""

    def behind_virtual(asked, key):
        own, begun = asked & (FAR - 1), jax.lax.shift_right_logical(asked, 16)
        return (key <= own) & ((key >= begun) | (key < front))

    def causal(own, key):
        return key <= own

    def in_window(own, key):
        return (key <= own) & (own - key < window)

    return behind_virtual if front else causal if window is None else in_window


def _padded(x: jax.Array, to: int, axis: int = 0) -> jax.Array:
    """Zeros behind, up to a multiple; of segments these are padding."""
    return jnp.pad(x, [(0, -x.shape[i] % to if i == axis else 0) for i in range(x.ndim)])
