"""Prefix tuning: trainable keys and values before every layer's own (Li & Liang, 2021).

  y = attention(q, [K ; k], [V ; v])        K, V of each layer, without rope, seen by every token

  k : [length, key heads x head size]  trainable f32, N(0, 1), zeros, or a text's keys as the untouched model makes
  v : [length, key heads x head size]  trainable f32, the same: its values     them at positions 0, 1, ...

Not the identity at init. Trainable per layer: 2 x length x key heads x head size.
Learning rate: 5e-5 to 5e-3 (the authors' GPT-2 runs: 5e-5; PEFT's MetaMathQA runs: 1e-3 and 5e-3).
Source: https://arxiv.org/abs/2101.00190, eq. 3; starts from a text: section 7.4.
Departs: no network behind the prefix while training (section 4.3); as in Hugging Face PEFT the tokens' positions begin
after the prefix. Under a sliding window the prefix goes out of sight as tokens do. Nothing folds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import front, hf, lift
from peftax.core.method import Ctx, Method
from peftax.core.sites import Block
from peftax.core.targets import layer_number

AXES = {"k": ("length", "heads"), "v": ("length", "heads")}
ATTENTION = "core_attn"  # the module that attends, after rope: (q [B,T,N,H], k and v [B,K,S,H], where, ...)


def prefix(
    *,
    length: int = 20,  # virtual tokens
    init: str = "normal",  # "normal" | "zeros" | "tokens": keys and values that the untouched model makes of a text
    init_text: str
    | None = None,  # the text of init="tokens", its chat template and all; a run's tokenizer makes init_ids
    init_ids: Sequence[int] = (),  # its token ids, at least `length`: the first ones count
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Trainable keys and values in every attention."""
    config = dict(locals())
    if length < 1:
        raise ValueError(f"prefix: length {length} must be at least 1")
    if init not in ("normal", "zeros", "tokens"):
        raise ValueError(f"prefix: init {init!r} is none of 'normal', 'zeros', 'tokens'")
    if (init == "tokens") != bool(len(init_ids) or init_text):
        raise ValueError("prefix: init='tokens' and init_text or init_ids belong together")
    if 0 < len(init_ids) < length:
        raise ValueError(
            f"prefix: the text of init='tokens' has {len(init_ids)} tokens, fewer than length {length}: lengthen it, "
            "or shorten the prefix"
        )

    def settings(name: str, kind: str) -> dict[str, Any] | None:
        return {} if kind == "block" and name.rsplit(".", 1)[-1] == ATTENTION else None

    def start(key, block: Block):
        _, heads, _, size = block.args[1]
        shape = (2, length, heads * size)
        k, v = jax.random.normal(key, shape) if init == "normal" else jnp.zeros(shape)
        return {"trainable": {"k": k, "v": v}}

    def begin(prefill):
        if not len(init_ids):
            raise ValueError("prefix: init_text is no ids yet; a run tokenizes it, elsewhere give init_ids")
        keys, values = prefill(init_ids[:length])  # no token sees those behind it

        def of_layer(name: str):
            number = layer_number(name) or 0
            return {leaf: x[number].swapaxes(0, 1).reshape(length, -1) for leaf, x in (("k", keys), ("v", values))}

        return of_layer

    def call(theta, run, args, ctx: Ctx):
        q, k, v, where, *rest = args
        rows, heads, _, size = k.shape

        def before(x, leaf):
            own = leaf.reshape(length, heads, size).swapaxes(0, 1)[None]
            return jnp.concatenate([jnp.broadcast_to(own, (rows, *own.shape[1:])).astype(x.dtype), x], axis=2)

        where = dataclasses.replace(
            where,
            k_positions=front.before(where.k_positions, jnp.arange(length)),
            k_segments=front.before(where.k_segments, front.everywhere(length)),
        )
        return run(q, before(k, theta["k"]), before(v, theta["v"]), where, *rest)

    return lift.per_block(
        "prefix",
        init=start,
        begin=begin if init == "tokens" else None,
        call=call,
        around=front.after(length),
        axes=AXES,
        settings=settings,
        adapter=adapter,
        config=config,
    )


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "length": config["num_virtual_tokens"],
        "init": "zeros" if config.get("init_weights") == "zero" else "normal",
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_virtual_tokens": config["length"],
        "init_weights": "zero" if config["init"] == "zeros" else None,
        "prefix_projection": False,
        "num_transformer_submodules": 1,
    }


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
