"""BERT encoders (BERT, MiniLM and others of model_type "bert"), bare or as classifiers.

Plain linen; module names are Hugging Face's. Positions and segments are data. Shapes: B batch, T tokens, D hidden,
N heads, H head size, F feed-forward. Dropout is not there: the method has its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from peftax.models.llama import ACTIVATIONS, REMAT, CoreAttention, linear, product
from peftax.ops.attention import Where
from peftax.ops.pooling import POOLINGS, pool

HF_TYPES = ("bert",)


@dataclasses.dataclass(frozen=True)
class Config:
    """A checkpoint's config.json in our words, and how to run it.

    labels: of a classifier; 0: the encoder alone, which has no head.
    """

    vocab: int
    positions: int
    kinds: int  # of tokens; all are of the first
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    norm_eps: float
    activation: str
    labels: int
    pooling: str
    scan: bool
    remat: str
    dtype: Any
    param_dtype: Any


def from_hf(
    config: Mapping[str, Any],
    *,
    scan: bool = True,
    remat: str = "none",
    attention: str = "auto",
    dtype: str = "float32",
    param_dtype: str = "float32",
    labels: int = 0,
    pooling: str | None = None,
) -> Bert:
    """The model of a Hugging Face config.json.

    Args:
      config: the parsed file.
      attention: "auto" | "xla": no other form sees both ways.
      labels: how many a classifier tells apart; 0: the encoder alone.
      pooling: "cls" (None: this), through the checkpoint's pooler, as transformers does | "mean" | "last".
      The others: as in llama.from_hf.
    """
    if remat not in REMAT:
        raise ValueError(f"model.remat {remat!r} is none of {', '.join(REMAT)}")
    if attention not in ("auto", "xla"):
        raise ValueError(f"model.attention {attention!r}: a bert's sees both ways, which 'auto' and 'xla' do")
    activation, kind = config.get("hidden_act", "gelu"), config.get("position_embedding_type") or "absolute"
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act {activation!r} is none of {', '.join(ACTIVATIONS)}")
    if kind != "absolute" or config.get("is_decoder"):
        raise ValueError(f"a bert with positions {kind!r}, or as a decoder, is not supported; the nearest is absolute")
    if pooling not in (None, *POOLINGS):
        raise ValueError(f"model.pooling {pooling!r} is none of {', '.join(POOLINGS)}")
    return Bert(
        Config(
            vocab=config["vocab_size"],
            positions=config.get("max_position_embeddings", 512),
            kinds=config.get("type_vocab_size", 2),
            hidden=config["hidden_size"],
            feed_forward=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            norm_eps=config.get("layer_norm_eps", 1e-12),
            activation=activation,
            labels=labels,
            pooling=pooling or "cls",
            scan=scan,
            remat=remat,
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(param_dtype),
        )
    )


def norm(c: Config, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=c.norm_eps, dtype=c.dtype, param_dtype=c.param_dtype, name=name)


class Embeddings(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, inputs, positions):
        c = self.config

        def table(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, c.hidden, dtype=c.dtype, param_dtype=c.param_dtype, name=name)

        words = table(c.vocab, "word_embeddings")
        h = words(inputs) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs.astype(c.dtype)
        h = h + table(c.kinds, "token_type_embeddings")(jnp.zeros_like(positions))
        return norm(c, "LayerNorm")(h + table(c.positions, "position_embeddings")(positions))


class SelfAttention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x_BxTxD, where: Where):
        c = self.config
        b, t, _ = x_BxTxD.shape
        q, k, v = (
            product(c, c.hidden, True, name, x_BxTxD).reshape(b, t, c.heads, -1) for name in ("query", "key", "value")
        )
        y = CoreAttention(name="core_attn")(q, k.swapaxes(1, 2), v.swapaxes(1, 2), where, None)
        return y.reshape(b, t, c.hidden)


class Output(nn.Module):
    """What a sublayer ends with: its projection, the sum with its input, the norm."""

    config: Config

    @nn.compact
    def __call__(self, y, h_BxTxD):
        c = self.config
        return norm(c, "LayerNorm")(h_BxTxD + product(c, c.hidden, True, "dense", y))


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, h_BxTxD, where: Where):
        y = SelfAttention(self.config, name="self")(h_BxTxD, where)
        return Output(self.config, name="output")(y, h_BxTxD)


class Intermediate(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, h_BxTxD):
        c = self.config
        return ACTIVATIONS[c.activation](product(c, c.feed_forward, True, "dense", h_BxTxD))


class Layer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, h, where: Where):
        c = self.config
        h = Attention(c, name="attention")(checkpoint_name(h, "layer_input"), where)
        return Output(c, name="output")(Intermediate(c, name="intermediate")(h), h), None


class Unrolled(nn.Module):
    """Layers named "0", "1", ... as in Hugging Face's tree."""

    config: Config

    @nn.compact
    def __call__(self, h, where: Where):
        for i in range(self.config.layers):
            h, _ = _remat(self.config)(self.config, name=str(i))(h, where)
        return h, None


def _remat(c: Config) -> type[nn.Module]:
    policy = REMAT[c.remat]
    return Layer if policy is None else nn.remat(Layer, prevent_cse=not c.scan, policy=policy)


class Layers(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, h, where: Where):
        c = self.config
        if not c.scan:
            return Unrolled(c, name="layer")(h, where)[0]
        scanned = nn.scan(
            _remat(c),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.layers,
        )
        return scanned(c, name="layer")(h, where)[0]


class Pooler(nn.Module):
    """What the checkpoint puts between the first token and a head."""

    config: Config

    @nn.compact
    def __call__(self, h_BxTxD):
        return jnp.tanh(linear(self.config, self.config.hidden, True, "dense")(h_BxTxD))


class Encoder(nn.Module):
    config: Config

    def setup(self):
        self.embeddings = Embeddings(self.config)
        self.encoder = Layers(self.config)
        if self.config.labels and self.config.pooling == "cls":
            self.pooler = Pooler(self.config)

    def __call__(self, inputs, positions, where: Where):
        return self.encoder(self.embeddings(inputs, positions), where)

    def pooled(self, h_BxTxD):
        return self.pooler(h_BxTxD)


class Bert(nn.Module):
    """Tokens [B, T] or embeddings [B, T, D] -> hidden states [B, T, D]; of a classifier the logits [B, T, labels] of
    each place's segment."""

    config: Config

    def setup(self):
        self.bert = Encoder(self.config)
        if self.config.labels:
            self.classifier = linear(self.config, self.config.labels, True)

    def __call__(self, inputs, positions=None, segment_ids=None):
        h, _ = self.hidden(inputs, positions, segment_ids)
        return self.head(h) if self.config.labels else h

    def hidden(self, inputs, positions=None, segment_ids=None):
        """(final hidden states [B, T, D], of a classifier each segment's own at all its places; None: no cache)."""
        b, t = inputs.shape[:2]
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
        if segment_ids is None:
            segment_ids = jnp.ones((b, t), jnp.int32)
        h = self.bert(inputs, positions, Where.both_ways(positions, segment_ids))
        return pool(self.config.pooling, h, segment_ids) if self.config.labels else h, None

    def head(self, h_BxTxD):
        """Pooled hidden states -> logits of the labels."""
        if not self.config.labels:
            raise ValueError("a bert without labels has no head: set config.model.labels to train or evaluate it")
        return self.classifier(self.bert.pooled(h_BxTxD) if self.config.pooling == "cls" else h_BxTxD)
