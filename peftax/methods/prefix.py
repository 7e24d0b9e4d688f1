"""Prefix tuning: trainable keys and values before every layer's own (Li & Liang, 2021).

  y = attention(q, [K ; k], [V ; v])        K, V of each layer, without rope, seen by every token
  K = g W_k + c_k, V = g W_v + c_v          with `projection`; g = tanh(e W + c), of all layers

  k, v     : [length, heads]      trainable f32, N(0, 1); zeros; or keys and values of a text at positions 0, 1, ..., as
                                  the untouched model makes them            (heads: key heads x head size)
  with `projection` in their place:
  e        : [length, heads]      trainable f32, shared by all layers, N(0, 1)
  w        : [heads, projection]  trainable f32, shared by all layers, U(±1/sqrt(rows)); c [projection] the same
  w_k, w_v : [projection, heads]  trainable f32, U(±1/sqrt(rows)), or zeros; c_k, c_v [heads] the same

Not the identity at init. Trainable per layer: 2 x length x key heads x head size.
Learning rate: 5e-5 to 5e-3 (the authors' GPT-2 runs: 5e-5; PEFT's MetaMathQA runs: 1e-3 and 5e-3).
Source: https://arxiv.org/abs/2101.00190, eq. 3; the network: section 4.3; a start from a text: section 7.4.
Departs: as in Hugging Face PEFT the tokens' positions begin after the prefix, the network is off by default, and a
folder holds the keys and values that it made, and no network: reading one gives a plain prefix, while its count is the
network's. Under a sliding window the prefix goes out of sight as tokens do. Nothing folds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import front, hf, lift
from peftax.core.method import Ctx, Method
from peftax.core.sites import Block
from peftax.core.targets import layer_number
from peftax.ops.product import linear

AXES = {"k": ("length", "heads"), "v": ("length", "heads"), "e": ("length", "heads")}
AXES |= {"w": ("heads", "projection"), "w_k": ("projection", "heads"), "w_v": ("projection", "heads")}
AXES |= {"c": ("projection",), "c_k": ("heads",), "c_v": ("heads",)}
ATTENTION = "core_attn"  # the module that attends, after rope: (q [B,T,N,H], k and v [B,K,S,H], where, ...)


def prefix(
    *,
    length: int = 20,  # virtual tokens
    init: str = "normal",  # "normal" | "zeros" | "tokens": keys and values that the untouched model makes of a text
    init_text: str | None = None,  # the text of init="tokens", template and all; a run's tokenizer makes init_ids of it
    init_ids: Sequence[int] = (),  # its token ids, at least `length`: the first ones count
    projection: int | None = None,  # width of a network behind the prefix in training; None: the prefix itself trains
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

    if projection is not None and (projection < 1 or init == "tokens"):
        raise ValueError(
            f"prefix: projection {projection} must be at least 1, and a text's keys have no network behind"
        )

    def settings(name: str, kind: str) -> dict[str, Any] | None:
        return {} if kind == "block" and name.rsplit(".", 1)[-1] == ATTENTION else None

    def start(key, block: Block):
        _, heads, _, size = block.args[1]
        width = heads * size
        if projection is None:
            shapes = {"k": (length, width), "v": (length, width)}
            draw = jax.random.normal
        else:
            shapes = {"w_k": (projection, width), "w_v": (projection, width), "c_k": (width,), "c_v": (width,)}
            draw = partial(_uniform, rows=projection)
        keys = jax.random.split(key, len(shapes))
        zeros = init != "normal"
        return {
            "trainable": {
                leaf: jnp.zeros(shape) if zeros else draw(own, shape)
                for own, (leaf, shape) in zip(keys, shapes.items(), strict=True)
            }
        }

    def shared(key, blocks: Sequence[Block]):
        assert projection is not None
        widths = {heads * size for _, heads, _, size in (block.args[1] for block in blocks)}
        if len(widths) > 1:
            raise ValueError(f"prefix: layers have keys of {sorted(widths)} numbers; projection wants one width")
        (width,), keys = widths, jax.random.split(key, 3)
        return {
            "trainable": {
                "e": jax.random.normal(keys[0], (length, width)),
                "w": _uniform(keys[1], (width, projection), rows=width),
                "c": _uniform(keys[2], (projection,), rows=width),
            }
        }

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
            front=None if where.front is None else length + where.front,
        )
        own_k, own_v = _keys_and_values(theta)
        return run(q, before(k, own_k), before(v, own_v), where, *rest)

    return lift.per_block(
        "prefix",
        init=start,
        begin=begin if init == "tokens" else None,
        call=call,
        shared=None if projection is None else shared,
        around=front.after(length),
        axes=AXES,
        settings=settings,
        adapter=adapter,
        config=config,
    )


def _uniform(key, shape: tuple[int, ...], *, rows: int) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-1 / math.sqrt(rows), maxval=1 / math.sqrt(rows))


def _keys_and_values(theta) -> tuple[Any, Any]:
    """One layer's, [length, heads] each."""
    if "k" in theta:
        return theta["k"], theta["v"]
    g = jnp.tanh(linear(theta["e"], theta["w"], theta["c"]))
    return linear(g, theta["w_k"], theta["c_k"]), linear(g, theta["w_v"], theta["c_v"])


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    behind = bool(config.get("prefix_projection"))
    width = config.get("encoder_hidden_size") or config.get("token_dim")
    if behind and width is None:
        raise hf.Unsupported(
            "PREFIX_TUNING with prefix_projection and no encoder_hidden_size is not supported; the nearest says one"
        )
    return {
        "length": config["num_virtual_tokens"],
        "init": "zeros" if config.get("init_weights") == "zero" else "normal",
        "projection": width if behind else None,
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = {
        "num_virtual_tokens": config["length"],
        "init_weights": "zero" if config["init"] == "zeros" else None,
        "num_transformer_submodules": 1,
    }
    if config["projection"] is None:  # what was behind it is in the folder that it came from, if there is one
        return fields
    return {**fields, "prefix_projection": True, "encoder_hidden_size": config["projection"]}


def _in_order(layers: Mapping[str, Any]) -> list[str]:
    numbers = {name: layer_number(name) for name in layers}
    return list(layers) if None in numbers.values() else sorted(layers, key=numbers.__getitem__)


def _pack(layers: hf.Layers, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """[length, layers x 2 x width]: keys and values of the first layer, of the second, ..."""
    layers = dict(layers)
    common = layers.pop("", {})
    parts = [np.asarray(x) for name in _in_order(layers) for x in _keys_and_values({**common, **layers[name]})]
    return {"prompt_embeddings": np.concatenate(parts, axis=1)}


def _unpack(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Any], config: Mapping[str, Any]) -> hf.Layers:
    names = _in_order(shapes)
    parts = np.split(tensors["prompt_embeddings"], 2 * len(names), axis=1)
    return {name: {"k": parts[2 * i], "v": parts[2 * i + 1]} for i, name in enumerate(names)}


def _held(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "projection": None}


HF = hf.Format(
    peft_type="PREFIX_TUNING", root=hf.BARE, read=_read, write=_write, pack=_pack, unpack=_unpack, held=_held
)
