"""Prefix tuning: trainable keys and values before every layer's own (Li & Liang, 2021).

  y = attention(q, [K ; k], [V ; v])        K, V of each layer, without rope, seen by every token

  k : [length, key heads x head size]  trainable f32, N(0, 1)
  v : [length, key heads x head size]  trainable f32, N(0, 1)

Not the identity at init. Trainable per layer: 2 x length x key heads x head size.
Learning rate: 5e-5 to 5e-3 (the authors' GPT-2 runs: 5e-5; PEFT's MetaMathQA runs: 1e-3 and 5e-3).
Source: https://arxiv.org/abs/2101.00190, eq. 3.
Departs: no network behind the prefix while training (section 4.3); as in Hugging Face PEFT the tokens' positions begin
after the prefix. Under a sliding window the prefix goes out of sight as tokens do. Nothing folds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import hf, lift
from peftax.core.method import Ctx, Method
from peftax.core.sites import Block
from peftax.core.targets import layer_number
from peftax.ops.attention import EVERYWHERE

AXES = {"k": ("length", "heads"), "v": ("length", "heads")}
ATTENTION = "core_attn"  # the module that attends, after rope: (q [B,T,N,H], k and v [B,K,S,H], where, ...)


def prefix(
    *,
    length: int = 20,  # virtual tokens
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Trainable keys and values in every attention."""
    config = dict(locals())
    if length < 1:
        raise ValueError(f"prefix: length {length} must be at least 1")

    def settings(name: str, kind: str) -> dict[str, Any] | None:
        return {} if kind == "block" and name.rsplit(".", 1)[-1] == ATTENTION else None

    def init(key, block: Block):
        _, heads, _, size = block.args[1]
        k, v = jax.random.normal(key, (2, length, heads * size))
        return {"trainable": {"k": k, "v": v}}

    def call(theta, run, args, ctx: Ctx):
        q, k, v, where, *rest = args
        rows, heads, _, size = k.shape

        def before(x, leaf):
            front = leaf.reshape(length, heads, size).swapaxes(0, 1)[None]
            return jnp.concatenate([jnp.broadcast_to(front, (rows, *front.shape[1:])).astype(x.dtype), x], axis=2)

        def with_front(values, front):
            return jnp.concatenate([jnp.broadcast_to(front, (rows, length)).astype(values.dtype), values], axis=1)

        where = dataclasses.replace(
            where,
            k_positions=with_front(where.k_positions, jnp.arange(length)[None]),
            k_segments=with_front(where.k_segments, jnp.full((1, 1), EVERYWHERE)),
        )
        return run(q, before(k, theta["k"]), before(v, theta["v"]), where, *rest)

    def around(run, args, kwargs, ctx: Ctx):
        if kwargs.get("method", "__call__") not in ("__call__", "hidden"):
            return run(args, kwargs, ctx)
        inputs, positions, *rest = (*args, None)[: max(2, len(args))]
        kwargs = dict(kwargs)
        positions = kwargs.pop("positions", positions)
        if positions is None:
            start = 0 if kwargs.get("cache") is None else kwargs["cache"]["index"]
            positions = jnp.broadcast_to(start + jnp.arange(inputs.shape[1])[None], inputs.shape[:2])
        return run((inputs, positions + length, *rest), kwargs, ctx)

    return lift.per_block(
        "prefix", init=init, call=call, around=around, axes=AXES, settings=settings, adapter=adapter, config=config
    )


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"length": config["num_virtual_tokens"]}


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_virtual_tokens": config["length"], "prefix_projection": False, "num_transformer_submodules": 1}


def _in_order(layers: Mapping[str, Any]) -> list[str]:
    numbers = {name: layer_number(name) for name in layers}
    return list(layers) if None in numbers.values() else sorted(layers, key=numbers.__getitem__)


def _pack(layers: hf.Layers, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """[length, layers x 2 x width]: keys and values of the first layer, of the second, ..."""
    parts = [layers[name][leaf] for name in _in_order(layers) for leaf in ("k", "v")]
    return {"prompt_embeddings": np.concatenate(parts, axis=1)}


def _unpack(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Any], config: Mapping[str, Any]) -> hf.Layers:
    names = _in_order(shapes)
    parts = np.split(tensors["prompt_embeddings"], 2 * len(names), axis=1)
    return {name: {"k": parts[2 * i], "v": parts[2 * i + 1]} for i, name in enumerate(names)}


HF = hf.Format(peft_type="PREFIX_TUNING", read=_read, write=_write, pack=_pack, unpack=_unpack)
