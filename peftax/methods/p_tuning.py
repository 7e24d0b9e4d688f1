"""P-tuning: a prompt that a small trainable network makes from trainable rows (Liu et al., 2021).

  h = [P ; E[x]]        P = f(e): `length` rows; the outputs there are cut off
  "mlp"   f(e) = relu(relu(e W0 + c0) W1 + c1) W2 + c2
  "lstm"  f(e) = relu(g W0 + c0) W1 + c1        g: both directions' states of `lstm_layers` layers over the rows of e

  e       : [length, out]                           trainable f32, N(0, 1)
  w0, ... : [out, size], [size, size], [size, out]  trainable f32, U(±1/sqrt(rows)); "lstm": [2 size, 2 size],
                                                    [2 size, out]
  c0, ... : one number for each column              trainable f32, U(±1/sqrt(rows of its matrix))
  x0, ... : [2, out or 2 size, 4 size]              trainable f32, U(±1/sqrt(size)): an LSTM layer's weights of its
  h0, ... : [2, size, 4 size]                       input, of its own state, and two biases; forward and backward,
  b0, ... : [2, 2, 4 size]                          gates i, f, g, o side by side
  p       : [length, out]                           "none": the prompt itself, trainable f32, N(0, 1)

Not the identity at init. Trainable: length x hidden, and the network: of "mlp" 3 hidden (hidden + 1).
Learning rate: 1e-4 to 1e-3 (PEFT's MetaMathQA run: 1e-4).
Source: https://arxiv.org/abs/2103.10385, section 3 (the LSTM and its head).
Departs: as in Hugging Face PEFT the rows stand before the tokens, not between them, and an "mlp" has three layers. Its
folder holds the rows that the network made, and no network: reading one gives encoder="none", a plain prompt that may
train on as such, while its count is the network's. Not a change of weights, so that nothing folds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import front, hf
from peftax.core.method import Ctx, Kernel, Method
from peftax.ops.product import linear

ENCODERS = ("mlp", "lstm", "none")


def p_tuning(
    *,
    length: int = 20,  # virtual tokens
    encoder: str = "mlp",  # "mlp" | "lstm" | "none": the rows that an encoder made, as a folder holds them
    size: int | None = None,  # width of the network; None: the table's
    lstm_layers: int = 2,  # layers of "lstm"
    encoder_dropout: float = 0.0,  # probability, between the LSTM's layers
    table: str | None = None,  # suffix of the tokens' table, where the model has several
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """A prompt behind a network."""
    config = dict(locals())
    for key, value in (("length", length), ("lstm_layers", lstm_layers), ("size", 1 if size is None else size)):
        if value < 1:
            raise ValueError(f"p_tuning: {key} {value} must be at least 1")
    if encoder not in ENCODERS:
        raise ValueError(f"p_tuning: encoder {encoder!r} is none of {', '.join(map(repr, ENCODERS))}")
    if not 0.0 <= encoder_dropout < 1.0:
        raise ValueError(f"p_tuning: encoder_dropout {encoder_dropout} must lie in [0, 1)")
    lstm = encoder == "lstm"

    def init(key, k: Kernel):
        width = k.w.shape[1]
        if encoder == "none":
            return {"trainable": {"p": jax.random.normal(key, (length, width))}}
        wide, keys = size or width, iter(jax.random.split(key, 3 * lstm_layers + 10))

        def uniform(fan_in, *shape):
            return jax.random.uniform(next(keys), shape, minval=-1 / math.sqrt(fan_in), maxval=1 / math.sqrt(fan_in))

        leaves = {"e": jax.random.normal(next(keys), (length, width))}
        for i in range(lstm_layers if lstm else 0):
            leaves[f"x{i}"] = uniform(wide, 2, 2 * wide if i else width, 4 * wide)
            leaves[f"h{i}"] = uniform(wide, 2, wide, 4 * wide)
            leaves[f"b{i}"] = uniform(wide, 2, 2, 4 * wide)
        sizes = [2 * wide, 2 * wide, width] if lstm else [width, wide, wide, width]
        for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            leaves[f"w{i}"], leaves[f"c{i}"] = uniform(n_in, n_in, n_out), uniform(n_in, n_out)
        return {"trainable": leaves}

    def rows(theta, ctx: Ctx, n: int):
        def between(i, y):
            own = ctx if ctx.key is None else ctx.replace(key=jax.random.fold_in(ctx.key, i))
            return own.drop(y, encoder_dropout)

        return _encoded(theta, encoder, lstm_layers, between)

    return front.prompts(
        "p_tuning",
        length=length,
        init=init,
        rows=rows,
        axes=_axes(encoder, lstm_layers),
        table=table,
        draws=lstm and encoder_dropout > 0,
        adapter=adapter,
        config=config,
    )


def _axes(encoder: str, layers: int) -> dict[str, tuple[str, ...]]:
    if encoder == "none":
        return {"p": ("length", "out")}
    axes: dict[str, tuple[str, ...]] = {"e": ("length", "out")}
    for i in range(layers if encoder == "lstm" else 0):
        axes |= {f"x{i}": ("ways", "states" if i else "out", "gates"), f"h{i}": ("ways", "states", "gates")}
        axes[f"b{i}"] = ("ways", "two", "gates")
    names = ["states", "states", "out"] if encoder == "lstm" else ["out", "states", "states", "out"]
    for i, (n_in, n_out) in enumerate(zip(names, names[1:], strict=False)):
        axes |= {f"w{i}": (n_in, n_out), f"c{i}": (n_out,)}
    return axes


def _encoded(theta, encoder: str, layers: int, between=lambda i, y: y) -> jax.Array:
    """The prompt [length, out]."""
    if encoder == "none":
        return theta["p"]
    y, last = theta["e"], 2
    if encoder == "lstm":
        last = 1
        for i in range(layers):
            x, h, b = (theta[f"{leaf}{i}"] for leaf in "xhb")
            y = between(i, y) if i else y
            y = jnp.concatenate([_lstm(y, x[0], h[0], b[0]), _lstm(y[::-1], x[1], h[1], b[1])[::-1]], axis=-1)
    for i in range(last):
        y = jax.nn.relu(linear(y, theta[f"w{i}"], theta[f"c{i}"]))
    return linear(y, theta[f"w{last}"], theta[f"c{last}"])


def _lstm(x_NxD, w_Dx4H, u_Hx4H, b_2x4H):
    """The states [N, H] of one direction: c' = σ(f) c + σ(i) tanh(g), h' = σ(o) tanh(c')."""
    given = linear(x_NxD, w_Dx4H, b_2x4H.sum(0))

    def step(state, own):
        h, c = state
        i, f, g, o = jnp.split(own + h @ u_Hx4H, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros(u_Hx4H.shape[:1])
    return jax.lax.scan(step, (zero, zero), given)[1]


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    if (config.get("num_transformer_submodules") or 1) != 1:
        raise hf.Unsupported("P_TUNING of an encoder and decoder is not supported; the nearest is a decoder's")
    return {
        "length": config["num_virtual_tokens"],
        "encoder": (config.get("encoder_reparameterization_type") or "MLP").lower(),
        "size": config.get("encoder_hidden_size"),
        "lstm_layers": config.get("encoder_num_layers") or 2,
        "encoder_dropout": config.get("encoder_dropout") or 0.0,
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = {"num_virtual_tokens": config["length"], "num_transformer_submodules": 1}
    if config["encoder"] == "none":  # what the encoder was is in the folder that it came from, if there is one
        return fields
    return {
        **fields,
        "encoder_reparameterization_type": config["encoder"].upper(),
        "encoder_hidden_size": config["size"],
        "encoder_num_layers": config["lstm_layers"],
        "encoder_dropout": config["encoder_dropout"],
    }


def _pack(layers: hf.Layers, config: Mapping[str, Any]) -> dict[str, Any]:
    ((_, leaves),) = layers.items()
    return {"prompt_embeddings": np.asarray(_encoded(leaves, config["encoder"], config["lstm_layers"]))}


def _unpack(tensors: Mapping[str, Any], shapes: Mapping[str, Any], config: Mapping[str, Any]) -> hf.Layers:
    (name,) = shapes
    return {name: {"p": tensors["prompt_embeddings"]}}


def _held(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "encoder": "none"}


HF = hf.Format(peft_type="P_TUNING", root=hf.BARE, read=_read, write=_write, pack=_pack, unpack=_unpack, held=_held)
