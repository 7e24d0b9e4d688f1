"""Losses: (apply, params, batch, ctx) -> (sum over what counts, how much counts); the step divides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from peftax.core.method import Ctx
from peftax.ops.cross_entropy import chunked_nll


def causal_lm(
    apply: Callable,
    params: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    ctx: Ctx | None = None,
    *,
    chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """Next-token loss of a model with `hidden` and `head`, weighted by batch["weights"].

    Args:
      batch: tokens, targets, positions, segment_ids int32 [B, T]; weights f32 [B, T]; tasks int32 [B, 1], if any.
      chunk: positions of the sequence whose logits exist at one time, over all devices that a row is split over.
    """
    nll = token_losses(apply, params, batch, ctx, chunk=chunk)
    return jnp.sum(nll * batch["weights"]), jnp.sum(batch["weights"])


def label_scores(apply, params, batch) -> dict[str, jax.Array]:
    """{"nll", "accuracy"} at every place, f32 [B, T]: a classifier's loss, and is its likeliest label the target?"""
    h, _ = apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"], method="hidden")
    logits = apply({"params": params}, h, method="head").astype(jnp.float32)
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    return {"nll": nll, "accuracy": (jnp.argmax(logits, -1) == batch["targets"]).astype(jnp.float32)}


def token_losses(apply, params, batch, ctx: Ctx | None = None, *, chunk: int = 128) -> jax.Array:
    """f32 [B, T]: the loss of every counted token, 0 elsewhere."""
    variables = {"params": params}
    if "tasks" in batch:
        ctx = (ctx or Ctx()).replace(tasks=batch["tasks"][:, 0])
    more = {} if ctx is None else {"ctx": ctx}  # a plain model.apply takes none
    h, _ = apply(
        variables,
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        method="hidden",
        **more,
    )

    def head(h, chunk):
        own = more if ctx is None or ctx.key is None else {"ctx": ctx.replace(chunk=chunk)}
        return apply(variables, h, method="head", **own)

    parts = getattr(apply, "token_parts", 1)
    return chunked_nll(head, h, batch["targets"], batch["weights"], chunk=chunk, parts=parts, numbered=True)
