"""Cross-entropy that never holds [tokens, vocabulary]."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def token_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in f32; logits [..., V], targets [...] integer."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def chunked_nll(
    head: Callable[[jax.Array], jax.Array],
    h_BxTxD: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    *,
    chunk: int = 128,
) -> jax.Array:
    """Negative log likelihood of every token, `chunk` positions of the sequence at a time.

      nll[b, t] = logsumexp_v(head(h)[b, t, v]) - head(h)[b, t, target[b, t]]   where weights > 0, else 0

    The sequence is split, never the flattened batch (that would gather all hidden states on a mesh). The
    backward pass recomputes the logits of one chunk at a time; chunks in which no weight is positive are skipped.

    Args:
      head: [B, C, D] -> [B, C, V].
      h_BxTxD: hidden states.
      targets_BxT: token ids.
      weights_BxT: which positions count; zero elsewhere.
      chunk: positions per step; the tail is padded.

    Returns:
      f32 [B, T].
    """
    b, t = targets_BxT.shape
    chunk = min(chunk, t)
    pad = -t % chunk
    n = (t + pad) // chunk

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, n, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def counted(h, y, w):
        return jnp.where(w > 0, token_nll(head(h), y), 0.0)

    def step(_, chunk_of):
        h, y, w = chunk_of
        skip = lambda h, y, w: jnp.zeros(y.shape, jnp.float32)  # noqa: E731
        return None, jax.lax.cond(jnp.any(w > 0), counted, skip, h, y, w)

    _, nll = jax.lax.scan(step, None, (split(h_BxTxD), split(targets_BxT), split(weights_BxT)))
    return jnp.moveaxis(nll, 0, 1).reshape(b, n * chunk)[:, :t]
