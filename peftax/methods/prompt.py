"""Prompt tuning: trainable rows before the embedded tokens (Lester et al., 2021).

  h = [P ; E[x]]        P: `length` rows; the outputs there are cut off

  p : [length, out]  trainable f32, N(0, 1), or rows of the table

Not the identity at init. Trainable: length x hidden.
Learning rate: 1e-3 to 3e-1 (the authors' T5 runs: 0.3 under Adafactor; PEFT's MetaMathQA runs: 1e-3).
Source: https://arxiv.org/abs/2104.08691, section 2; the ways to start: section 3.2.
The rows are a segment that every other sees, so that packed examples share one prompt and see nothing else.
Departs: rows of the vocabulary are drawn from all of it (as in Hugging Face PEFT), none twice while it has enough.
A text's ids are what the tokenizer gives for it, its special tokens too, as in PEFT. Not a change of weights, so that
nothing folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftax.core import front, hf
from peftax.core.method import Kernel, Method
from peftax.ops.product import matmul

AXES = {"p": ("length", "out")}


def prompt(
    *,
    length: int = 20,  # virtual tokens
    init: str = "normal",  # "normal" | "vocabulary": rows of the table, drawn at random | "tokens": those of a text
    init_text: str | None = None,  # the text of init="tokens"; a run's tokenizer makes init_ids of it
    init_ids: Sequence[int] = (),  # its token ids; repeated or cut to `length`
    table: str | None = None,  # suffix of the tokens' table, where the model has several
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """A trainable prompt before every row of tokens."""
    config = dict(locals())
    if length < 1:
        raise ValueError(f"prompt: length {length} must be at least 1")
    if init not in ("normal", "vocabulary", "tokens"):
        raise ValueError(f"prompt: init {init!r} is none of 'normal', 'vocabulary', 'tokens'")
    if (init == "tokens") != bool(len(init_ids) or init_text):
        raise ValueError("prompt: init='tokens' and init_text or init_ids belong together")

    def start(key, k: Kernel):
        rows, width = k.w.shape
        if init == "normal":
            return {"trainable": {"p": jax.random.normal(key, (length, width))}}
        if init == "tokens" and not len(init_ids):
            raise ValueError("prompt: init_text is no ids yet; a run tokenizes it, elsewhere give init_ids")
        ids = jnp.resize(jnp.asarray(init_ids), (length,)) if init == "tokens" else None
        if ids is None:
            ids = jax.random.choice(key, rows, (length,), replace=rows < length)
        return {"trainable": {"p": matmul(ids, k.w).astype(jnp.float32)}}

    return front.prompts(
        "prompt",
        length=length,
        init=start,
        rows=lambda theta, ctx, n: theta["p"],
        axes=AXES,
        table=table,
        adapter=adapter,
        config=config,
    )


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


HF = hf.Format(peft_type="PROMPT_TUNING", root=hf.BARE, read=_read, write=_write, pack=_pack, unpack=_unpack)
