"""Prompt tuning: trainable rows before the embedded tokens (Lester et al., 2021).

  h = [P ; E[x]]        P: `length` rows; the outputs there are cut off

  p : [length, out]  trainable f32, N(0, 1), or rows of the table

Not the identity at init. Trainable: length x hidden.
Learning rate: 1e-3 to 3e-1 (the authors' T5 runs: 0.3 under Adafactor; PEFT's MetaMathQA runs: 1e-3).
Source: https://arxiv.org/abs/2104.08691, section 2; the ways to start: section 3.2.
The rows are a segment that every other sees, so that packed examples share one prompt and see nothing else.
Departs: nothing. Not a change of weights, so that nothing folds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftax.core import hf, lift
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.sites import first_output
from peftax.ops.attention import EVERYWHERE
from peftax.ops.product import matmul

AXES = {"p": ("length", "out")}


def prompt(
    *,
    length: int = 20,  # virtual tokens
    init: str = "normal",  # "normal" | "vocabulary": rows of the table, drawn at random | "tokens": those of init_ids
    init_ids: Sequence[int] = (),  # token ids, as of a text; repeated or cut to `length`
    table: str | None = None,  # suffix of the tokens' table, where the model has several
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """A trainable prompt before every row of tokens."""
    config = dict(locals())
    if length < 1:
        raise ValueError(f"prompt: length {length} must be at least 1")
    if init not in ("normal", "vocabulary", "tokens"):
        raise ValueError(f"prompt: init {init!r} is none of 'normal', 'vocabulary', 'tokens'")
    if (init == "tokens") != bool(len(init_ids)):
        raise ValueError("prompt: init_ids and init='tokens' belong together")

    def settings(name: str, kind: str) -> dict[str, Any] | None:
        return {} if kind == "embed" and (table is None or f".{name}".endswith(f".{table}")) else None

    def start(key, k: Kernel):
        rows, width = k.w.shape
        if init == "normal":
            return {"trainable": {"p": jax.random.normal(key, (length, width))}}
        ids = jnp.resize(jnp.asarray(init_ids), (length,)) if init == "tokens" else None
        if ids is None:
            ids = jax.random.choice(key, rows, (length,), replace=rows < length)
        return {"trainable": {"p": k.w[ids].astype(jnp.float32)}}

    def call(theta, x, k: Kernel, ctx: Ctx):
        y = matmul(x, k.w)
        if not ctx.front:
            return y
        p = jnp.broadcast_to(theta["p"][None], (y.shape[0], *theta["p"].shape))
        return jax.lax.dynamic_update_slice(y, p, (0, 0, 0))

    def around(run, args, kwargs, ctx: Ctx):
        if kwargs.get("method", "__call__") not in ("__call__", "hidden"):
            return run(args, kwargs, ctx)
        tokens, positions, segments, *rest = (*args, None, None)[: max(3, len(args))]
        positions, segments = kwargs.pop("positions", positions), kwargs.pop("segment_ids", segments)
        cache = kwargs.get("cache")
        first = cache is None or ctx.start
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError("prompt: the model is given embeddings; it needs token ids, whose rows it prepends")
        rows = tokens.shape[0]

        def with_front(values, front):
            return jnp.concatenate([jnp.broadcast_to(front, (rows, length)).astype(values.dtype), values], axis=1)

        if first:
            tokens = with_front(tokens, jnp.zeros((1, 1), tokens.dtype))
        if positions is not None:
            positions = positions + length
            positions = with_front(positions, jnp.arange(length)[None]) if first else positions
        if segments is not None and first:
            segments = with_front(segments, jnp.full((1, 1), EVERYWHERE))
        given = [tokens, positions, segments, *rest]
        while given[-1] is None:
            given.pop()
        out = run(tuple(given), kwargs, ctx.replace(front=length if first else 0))
        if not first:
            return out
        y = first_output(out)[:, length:]
        return (y, *out[1:]) if isinstance(out, tuple) else y

    lifted = lift.per_kernel(
        "prompt",
        init=start,
        call=call,
        fold=None,
        around=around,
        front=length,
        axes=AXES,
        settings=settings,
        adapter=adapter,
        config=config,
    )

    def init_once(key, params, sites):
        tables = [s.path for s in sites.values() if settings(s.path.replace("/", "."), s.kind) is not None]
        if len(tables) > 1:
            raise ValueError(
                f"prompt: the model has several tables: {', '.join(tables)}; name the tokens' with `table`"
            )
        return lifted.init(key, params, sites)

    return dataclasses.replace(lifted, init=init_once)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    if (config.get("num_transformer_submodules") or 1) != 1:
        raise hf.Unsupported("PROMPT_TUNING of an encoder and decoder is not supported; the nearest is a decoder's")
    return {"length": config["num_virtual_tokens"]}


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_virtual_tokens": config["length"], "prompt_tuning_init": "RANDOM", "num_transformer_submodules": 1}


def _pack(layers: hf.Layers, config: Mapping[str, Any]) -> dict[str, Any]:
    ((_, leaves),) = layers.items()
    return {"prompt_embeddings": leaves["p"]}


def _unpack(tensors: Mapping[str, Any], shapes: Mapping[str, Any], config: Mapping[str, Any]) -> hf.Layers:
    (name,) = shapes
    return {name: {"p": tensors["prompt_embeddings"]}}


HF = hf.Format(peft_type="PROMPT_TUNING", read=_read, write=_write, pack=_pack, unpack=_unpack)
