"""Cross-entropy that never holds [tokens, vocabulary]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp


def token_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in f32; logits [..., V], targets [...] integer."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def chunked_nll(
    head: Callable[..., jax.Array],
    h_BxTxD: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    *,
    chunk: int = 128,
    parts: int = 1,
    numbered: bool = False,
) -> jax.Array:
    """Negative log likelihood of every token, `chunk` positions of the sequence at a time.

      nll[b, t] = logsumexp_v(head(h)[b, t, v]) - head(h)[b, t, target[b, t]]   where weights > 0, else 0

    The sequence is split, never the flattened batch (that would gather all hidden states on a mesh). Where a mesh
    splits it already, a chunk takes as much of each of its `parts`: every device works on every chunk. Chunks in
    which no weight is positive are skipped. While nothing in the head trains, the forward pass keeps
    d nll[b, t] / d h[b, t] and the backward pass only scales it, so that the logits are made once; else the
    backward pass makes them again, one chunk at a time.

    Args:
      head: [B, C, D] -> [B, C, V], each position by itself; `numbered`: ([B, C, D], the chunk's number int32 []).
      h_BxTxD: hidden states.
      targets_BxT: token ids.
      weights_BxT: which positions count; zero elsewhere.
      chunk: positions per step; the tail is padded.
      parts: into how many parts a mesh splits T; where it does not divide T, T is taken as one.

    Returns:
      f32 [B, T].
    """
    b, t = targets_BxT.shape
    parts = 1 if t % parts else parts
    own = t // parts
    chunk = min(max(1, chunk // parts), own)  # positions of one part
    pad = -own % chunk
    n = (own + pad) // chunk

    def split(x):  # [B, T, ...] -> [n, B, parts x chunk, ...]
        x = x.reshape(b, parts, own, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 3))
        x = jnp.moveaxis(x.reshape(b, parts, n, chunk, *x.shape[3:]), 2, 0)
        return x.reshape(n, b, parts * chunk, *x.shape[4:])

    h, y, counted = split(h_BxTxD), split(targets_BxT), split(weights_BxT > 0)
    at = jnp.arange(n, dtype=jnp.int32)
    head, closed_over = jax.closure_convert(head if numbered else lambda h, _: head(h), h[0], at[0])
    nll = cast(jax.Array, _nll(head, h, at, y, counted, *closed_over))
    nll = jnp.moveaxis(nll.reshape(n, b, parts, chunk), 0, 2)
    return nll.reshape(b, parts, n * chunk)[:, :, :own].reshape(b, t)


@jax.custom_batching.custom_vmap
def _anywhere(counted: jax.Array) -> jax.Array:
    """Does anything count: of a population, in any member. One answer for all, or its `cond` would become a `select`,
    which does both and copies what it chooses from.
    """
    return jnp.any(counted)


@_anywhere.def_vmap
def _(size, batched, counted):
    del size, batched
    return jnp.any(counted), False


def _by_chunk(of_chunk, h, at, y, counted):
    """`of_chunk(h, at, y, counted)` of every chunk, stacked; zeros for the chunks in which nothing counts."""

    def step(_, args):
        shapes = jax.eval_shape(of_chunk, *args)
        skip = lambda *_: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)  # noqa: E731
        return None, jax.lax.cond(_anywhere(args[-1]), of_chunk, skip, *args)

    return jax.lax.scan(step, None, (h, at, y, counted))[1]


# A cond that is differentiated inside a scan would keep the head's kernel once per chunk: hence a rule of our own.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(head, h, at, y, counted, *consts):
    def of_chunk(h, at, y, counts):
        return jnp.where(counts, token_nll(head(h, at, *consts), y), 0.0)

    return _by_chunk(of_chunk, h, at, y, counted)


def _forward(head, h, at, y, counted, *consts):
    trained = [c.value if c.perturbed else None for c in consts]
    h, at, y, counted, *consts = (x.value for x in (h, at, y, counted, *consts))
    if any(t is not None for t in trained):
        return _nll(head, h, at, y, counted, *consts), (trained, None, (h, at, y, counted, consts))

    def of_chunk(h, at, y, counts):
        nll, back = jax.vjp(lambda h: jnp.where(counts, token_nll(head(h, at, *consts), y), 0.0), h)
        return nll, back(jnp.ones_like(nll))[0]

    nll, slope = _by_chunk(of_chunk, h, at, y, counted)
    return nll, (trained, slope, None)


def _backward(head, kept, d_nll):
    trained, slope, again = kept
    if again is None:
        return (d_nll[..., None] * slope).astype(slope.dtype), None, None, None, *trained
    *chunks, consts = again

    def step(d_trained, chunk_of):
        h, at, y, counts, d_nll = chunk_of

        def nll_of(h, trained):
            now = [c if t is None else t for c, t in zip(consts, trained, strict=True)]
            return jnp.where(counts, token_nll(head(h, at, *now), y), 0.0)

        def back(h, d_nll):
            d_h, more = jax.vjp(nll_of, h, trained)[1](d_nll)
            return jax.tree.map(jnp.add, d_trained, more), d_h

        return jax.lax.cond(_anywhere(counts), back, lambda h, _: (d_trained, jnp.zeros_like(h)), h, d_nll)

    d_trained, d_h = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, trained), (*chunks, d_nll))
    return d_h, None, None, None, *d_trained


_nll.defvjp(_forward, _backward, symbolic_zeros=True)
