"""The models that papers count on: linen backbones where peftax has one, else their kernels alone.

Source of the sizes: each model's config.json on the Hugging Face hub, GPT-3's from its paper
(https://arxiv.org/abs/2005.14165, table 2.1), LLaMA's from https://arxiv.org/abs/2302.13971, table 2.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from peftax import methods, models
from peftax.core import sites
from peftax.weights.outlines import KNOWN

KERNELS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# --- a backbone's kernels, by the names that the Llama family gives them ---------------------------------


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers of one kind.

    attention: modules with q, k, v and o_proj; `inner` is how wide q, k and v are, None: as the model.
    biased: kernels that have a bias.
    norms:  names of norms as wide as the model.
    """

    layers: int
    width: int
    wide: int
    inner: int | None = None
    attention: tuple[str, ...] = ("self_attn",)
    gated: bool = False
    biased: tuple[str, ...] = KERNELS
    norms: tuple[str, ...] = ("norm_1", "norm_2")


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Tables (name, rows, width), stacks by name, and what stands outside of them.

    linear: (name, in, out) of kernels with a bias; `head`: rows of an untied one without.
    norm_bias: do norms have one.
    """

    tables: tuple[tuple[str, int, int], ...]
    stacks: tuple[tuple[str, Stack], ...]
    norms: tuple[str, ...] = ()
    norm_bias: bool = True
    linear: tuple[tuple[str, int, int], ...] = ()
    head: int = 0


class CoreAttn(nn.Module):
    """Where a prefix stands."""

    def __call__(self, q, k, v, where):
        return q


class Attention(nn.Module):
    stack: Stack

    @nn.compact
    def __call__(self, x):
        of = self.stack
        inner = of.inner or of.width
        q, k, v = (nn.Dense(inner, use_bias=n in of.biased, name=n)(x) for n in ("q_proj", "k_proj", "v_proj"))
        y = CoreAttn(name="core_attn")(*(a[:, None] for a in (q, k, v)), None)[:, 0]
        return nn.Dense(of.width, use_bias="o_proj" in of.biased, name="o_proj")(y)


class FeedForward(nn.Module):
    stack: Stack

    @nn.compact
    def __call__(self, x):
        of = self.stack
        for name in ("gate_proj", "up_proj") if of.gated else ("up_proj",):
            y = nn.Dense(of.wide, use_bias=name in of.biased, name=name)(x)
        return nn.Dense(of.width, use_bias="down_proj" in of.biased, name="down_proj")(y)


class Layer(nn.Module):
    stack: Stack
    norm_bias: bool

    @nn.compact
    def __call__(self, x, _):
        for name in self.stack.attention:
            x = Attention(self.stack, name=name)(x)
        x = FeedForward(self.stack, name="mlp")(x)
        for name in self.stack.norms:
            x = nn.LayerNorm(use_bias=self.norm_bias, name=name)(x)
        return x, None


class Outline(nn.Module):
    """A module with these kernels, for counting: what it computes means nothing."""

    shapes: Shapes

    @nn.compact
    def __call__(self, tokens):
        of = self.shapes
        width = of.stacks[0][1].width
        for name, rows, wide in of.tables:
            nn.Embed(rows, wide, name=name)(tokens)
        x = jnp.zeros((*tokens.shape, width))
        for name, stack in of.stacks:
            many = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=stack.layers)
            x, _ = many(stack, of.norm_bias, name=name)(x, None)
        for name in of.norms:
            x = nn.LayerNorm(use_bias=of.norm_bias, name=name)(x)
        for name, n_in, n_out in of.linear:
            nn.Dense(n_out, name=name)(jnp.zeros((1, n_in)))
        return nn.Dense(of.head, use_bias=False, name="lm_head")(x) if of.head else x


# --- decoders and encoders that peftax has no backbone for ------------------------------------------------


def gpt2(layers: int, width: int, *, norms: tuple[str, ...] = ()) -> Shapes:
    """`norms`: more of them in each layer, as an adapter brings along."""
    stack = Stack(layers, width, 4 * width, norms=("norm_1", "norm_2", *norms))
    return Shapes((("wte", 50257, width), ("wpe", 1024, width)), (("layers", stack),), norms=("norm",))


def bert(layers: int, width: int, rows: int, positions: int, types: int, classes: int = 0) -> Shapes:
    """With a pooler, or with RoBERTa's two-layer head of so many classes in its place."""
    tables = (("word", rows, width), ("position", positions, width), ("type", types, width))
    top = [("classifier_dense" if classes else "pooler", width, width)]
    top += [("classifier_out_proj", width, classes)] if classes else []
    return Shapes(tables, (("layers", Stack(layers, width, 4 * width)),), norms=("norm",), linear=tuple(top))


def plain(layers: int, width: int, wide: int, **more: Any) -> Shapes:
    """A decoder or encoder of which only the layers' kernels count, and the width of its table."""
    return Shapes((("embed_tokens", 1, width),), (("layers", Stack(layers, width, wide, **more)),))


def t5(layers: int, width: int, wide: int, heads: int, *, gated: bool = True, biased: tuple[str, ...] = ()) -> Shapes:
    """T5 1.1 (gated, untied) or the first T5; heads of 64; `biased`: kernels that BitFit gives a bias."""
    common: dict[str, Any] = dict(inner=64 * heads, gated=gated, biased=biased)
    encoder = Stack(layers, width, wide, **common)
    decoder = Stack(
        layers, width, wide, **common, attention=("self_attn", "cross_attn"), norms=("norm_1", "norm_2", "norm_3")
    )
    tables = (("embed_tokens", 32128, width), ("encoder_distance", 32, heads), ("decoder_distance", 32, heads))
    stacks = (("encoder", encoder), ("decoder", decoder))
    return Shapes(tables, stacks, ("encoder_norm", "decoder_norm"), norm_bias=False, head=32128 if gated else 0)


def seq2seq(layers: int, width: int, rows: int, positions: int) -> Shapes:
    """BART, Whisper: biases everywhere, a norm on the embeddings."""
    decoder = Stack(
        layers, width, 4 * width, attention=("self_attn", "cross_attn"), norms=("norm_1", "norm_2", "norm_3")
    )
    tables = (("shared", rows, width), ("encoder_position", positions, width), ("decoder_position", positions, width))
    stacks = (("encoder", Stack(layers, width, 4 * width)), ("decoder", decoder))
    return Shapes(tables, stacks, ("encoder_norm", "decoder_norm"))


BITFIT_T_FEW = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")

SHAPE_ONLY: dict[str, Shapes] = {
    "GPT-3": plain(96, 12288, 4 * 12288),
    "GPT-2 small": gpt2(12, 768),
    "GPT-2 medium": gpt2(24, 1024),
    "GPT-2 large": gpt2(36, 1280),
    "GPT-2 XL": gpt2(48, 1600),
    "GPT-2 medium, adapter norm": gpt2(24, 1024, norms=("adapter_norm",)),
    "GPT-2 large, adapter norm": gpt2(36, 1280, norms=("adapter_norm",)),
    "RoBERTa-base": bert(12, 768, 50265, 514, 1),
    "RoBERTa-large": bert(24, 1024, 50265, 514, 1),
    "RoBERTa-base, 2 classes": bert(12, 768, 50265, 514, 1, classes=2),
    "BERT-base-cased": bert(12, 768, 28996, 512, 2),
    "BERT-large-cased": bert(24, 1024, 28996, 512, 2),
    "DeBERTa-XXL": plain(48, 1536, 6144),
    "DeBERTaV3-base": plain(12, 768, 3072),
    "T5.1.1-small": t5(8, 512, 1024, 6),
    "T5.1.1-base": t5(12, 768, 2048, 12),
    "T5.1.1-large": t5(24, 1024, 2816, 16),
    "T5.1.1-XL": t5(24, 2048, 5120, 32),
    "T5.1.1-XXL": t5(24, 4096, 10240, 64),
    "T5.1.1-XL, biases": t5(24, 2048, 5120, 32, biased=BITFIT_T_FEW),
    "T5-base": t5(12, 768, 3072, 12, gated=False),
    "T5-base, biases": t5(12, 768, 3072, 12, gated=False, biased=KERNELS),
    "mT0-large": t5(24, 1024, 2816, 16),
    "BART-large": seq2seq(12, 1024, 50265, 1026),
    "Whisper-large-v2": seq2seq(32, 1280, 51865, 1500),
    "Gemma-7B": plain(28, 3072, 24576, inner=4096, gated=True),
    "OPT-6.7B": plain(32, 4096, 16384),
    "BLOOMZ-560M": plain(24, 1024, 4096),
    "ViT-base, 101 classes": dataclasses.replace(plain(12, 768, 3072), linear=(("classifier", 768, 101),)),
}


# --- the Llama family, on peftax's own backbone -------------------------------------------------------------


def llama(layers: int, width: int, wide: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = dict(num_hidden_layers=layers, hidden_size=width, intermediate_size=wide, num_attention_heads=heads)
    return {"model_type": "llama", "vocab_size": 32000, **sizes, **more}


REAL: dict[str, Mapping[str, Any]] = {
    "LLaMA-7B": llama(32, 4096, 11008, 32),
    "LLaMA-13B": llama(40, 5120, 13824, 40),
    "LLaMA-33B": llama(60, 6656, 17920, 52),
    "LLaMA-65B": llama(80, 8192, 22016, 64),
    "Llama-3-8B": KNOWN["meta-llama/Llama-3.1-8B"],  # of the same shapes
    "Llama-3.1-8B": KNOWN["meta-llama/Llama-3.1-8B"],
    "Llama-3.2-1B": KNOWN["meta-llama/Llama-3.2-1B"],
    "Llama-3.2-3B": KNOWN["meta-llama/Llama-3.2-3B"],
    "Mistral-7B": KNOWN["mistralai/Mistral-7B-v0.3"] | {"vocab_size": 32000},
    "Qwen2.5-3B": llama(
        36, 2048, 11008, 16, model_type="qwen2", num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True
    ),
}
REAL |= {"Llama-2-7B": REAL["LLaMA-7B"], "Llama-2-13B": REAL["LLaMA-13B"]}


@dataclasses.dataclass(frozen=True)
class Found:
    """A model in shapes, and where a method can stand in it."""

    shapes: Mapping[str, Any]
    sites: sites.Sites

    def count(self, name: str, **settings: Any) -> int:
        """What the method trains here."""
        return sites.count(methods.make(name, **settings), self.shapes, self.sites)["trainable"]

    @property
    def total(self) -> int:
        return self.count("full")


@functools.cache
def found(model: str) -> Found:
    """Raises KeyError where no model has that name."""
    return look(models.build(REAL[model]) if model in REAL else Outline(SHAPE_ONLY[model]))


def look(module: nn.Module) -> Found:
    shapes = models.abstract(module)
    return Found(shapes, sites.find(module.apply, shapes, jax.ShapeDtypeStruct((1, 3), jnp.int32)))
