"""The Llama family: Llama 2/3, Mistral, Qwen2/2.5, Qwen3, SmolLM2/3.

Plain linen; module names are Hugging Face's. Positions and segments are data. Shapes: B batch, T tokens, S
keys, D hidden, N heads, K key heads, H head size, F feed-forward, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from peftax.ops.attention import FORMS, Where, attention
from peftax.ops.pooling import POOLINGS, pool
from peftax.ops.product import kept

HF_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
}
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names("product", "attention"),  # by name: never a method's ΔW
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
NO_WINDOW = np.iinfo(np.int32).max
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # of its rope
DEFAULTS = {  # what a config.json leaves out is what transformers' class of that type says
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "smollm3": {
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A checkpoint's config.json in our words, and how to run it."""

    vocab: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    norm_eps: float
    tied: bool
    attention_bias: bool  # on q, k, v
    output_bias: bool  # on o_proj
    mlp_bias: bool
    qk_norm: bool
    activation: str
    inv_freq: tuple[float, ...]
    rope_scale: float
    rope_layers: tuple[bool, ...]
    windows: tuple[int, ...]
    labels: int  # of a classifier; 0: a language model
    pooling: str
    scan: bool
    remat: str
    attention: str
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
) -> Llama:
    """The model of a Hugging Face config.json.

    Args:
      config: the parsed file.
      scan: one traced layer over stacked weights, or every layer by itself.
      remat: "none" | "dots" | "full" | "offload": what the backward pass makes again: nothing, all but the outputs of
        linear layers and of attention, everything in a layer, or that with the layers' inputs kept in the host's
        memory.
      attention: one of ops.attention.FORMS.
      dtype: of activations and products.
      param_dtype: of weights that `init` makes.
      labels: how many a classifier tells apart; 0: a language model.
      pooling: of a classifier: "last" (None: this), as transformers does | "cls" | "mean".
    """
    kind = config["model_type"]
    c = {**DEFAULTS.get(kind, {}), **config}
    if remat not in REMAT:
        raise ValueError(f"model.remat {remat!r} is none of {', '.join(REMAT)}")
    if attention not in FORMS:
        raise ValueError(f"model.attention {attention!r} is none of {', '.join(FORMS)}")
    if pooling not in (None, *POOLINGS):
        raise ValueError(f"model.pooling {pooling!r} is none of {', '.join(POOLINGS)}")
    heads, layers = c["num_attention_heads"], c["num_hidden_layers"]
    head_size = c.get("head_dim") or c["hidden_size"] // heads
    activation = c.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act {activation!r} is none of {', '.join(ACTIVATIONS)}")
    kv_heads = c.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads {kv_heads} must divide num_attention_heads {heads}")
    if head_size % 2:
        raise ValueError(f"head_dim {head_size} (or hidden_size / num_attention_heads) must be even: rope turns pairs")
    inv_freq, rope_scale = rope_frequencies(c, head_size)
    qkv_bias = kind == "qwen2" or bool(c.get("attention_bias", False))
    return Llama(
        Config(
            vocab=c["vocab_size"],
            hidden=c["hidden_size"],
            feed_forward=c["intermediate_size"],
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            norm_eps=c.get("rms_norm_eps", 1e-6),
            tied=bool(c.get("tie_word_embeddings", False)),
            attention_bias=qkv_bias,
            output_bias=kind != "qwen2" and bool(c.get("attention_bias", False)),
            mlp_bias=bool(c.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            activation=activation,
            inv_freq=tuple(inv_freq.tolist()),
            rope_scale=rope_scale,
            rope_layers=_rope_layers(c, layers),
            windows=_windows(c, layers),
            labels=labels,
            pooling=pooling or "last",
            scan=scan,
            remat=remat,
            attention=attention,
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(param_dtype),
        )
    )


def rope_frequencies(config: Mapping[str, Any], head_size: int) -> tuple[np.ndarray, float]:
    """(inverse frequencies [H/2] in f32, factor on cos and sin) of a config's rope.

    Source: transformers `modeling_rope_utils.py`; llama3: the Llama 3.1 release's scaled rope.
    """
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(theta, numbers.Real) or theta <= 0:
        raise ValueError(f"rope_theta {theta!r} must be a positive number")
    needs = {"linear": ("factor",), "llama3": LLAMA3}.get(kind, ())
    if wrong := [key for key in needs if not isinstance(rope.get(key), numbers.Real)]:
        raise ValueError(f"rope_scaling of type {kind!r} wants {wrong[0]}, a number; it has {rope.get(wrong[0])!r}")
    inv = 1.0 / theta ** (np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size))
    inv = inv.astype(np.float32)
    if kind == "default":
        return inv, 1.0
    if kind == "linear":
        return inv / np.float32(rope["factor"]), 1.0
    if kind == "llama3":
        factor, low, high, old = (rope[key] for key in LLAMA3)
        wavelength = 2 * math.pi / inv
        smooth = np.clip((old / wavelength - low) / (high - low), 0.0, 1.0)
        return ((1 - smooth) * inv / factor + smooth * inv).astype(np.float32), 1.0
    raise ValueError(f"rope_type {kind!r} is not supported; supported: default, linear, llama3")


def _rope_layers(c: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """SmolLM3 leaves rope out of some layers; its list holds 1 where rope is used."""
    used = c.get("no_rope_layers")
    if c["model_type"] != "smollm3":
        return (True,) * layers
    if used is None:
        every = c.get("no_rope_layer_interval", 4)
        return tuple((i + 1) % every != 0 for i in range(layers))
    return tuple(bool(u) for u in _one_a_layer(c, "no_rope_layers", layers))


def _one_a_layer(c: Mapping[str, Any], key: str, layers: int) -> Sequence[Any]:
    if len(c[key]) != layers:
        raise ValueError(f"{key} has {len(c[key])} entries and num_hidden_layers is {layers}; it wants one for each")
    return c[key]


def _windows(c: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """How far back each layer sees."""
    window = c.get("sliding_window")
    kinds = c.get("layer_types")
    if not window or (c["model_type"] != "mistral" and not c.get("use_sliding_window", False)):
        return (NO_WINDOW,) * layers
    if kinds:
        return tuple(window if k == "sliding_attention" else NO_WINDOW for k in _one_a_layer(c, "layer_types", layers))
    if c["model_type"] == "smollm3":
        return tuple(NO_WINDOW if roped else window for roped in _rope_layers(c, layers))
    first = 0 if c["model_type"] == "mistral" else c["max_window_layers"]
    return tuple(window if i >= first else NO_WINDOW for i in range(layers))


def rotate(x_BxTxNxH: jax.Array, cos_BxTxH2: jax.Array, sin_BxTxH2: jax.Array) -> jax.Array:
    """Hugging Face's rotate_half: pairs are (i, i + H/2)."""
    x1, x2 = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BxTxH2[:, :, None], sin_BxTxH2[:, :, None]
    out = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return out.astype(x_BxTxNxH.dtype)


def linear(c: Config, features: int, bias: bool, name: str | None = None, dot: Callable | None = None) -> nn.Dense:
    more = {"use_bias": bias, "dtype": c.dtype, "param_dtype": c.param_dtype, "dot_general": dot}
    return nn.Dense(features, name=name, **more)


def product(c: Config, features: int, bias: bool, name: str, x: jax.Array) -> jax.Array:
    """A linear layer whose product remat "dots" can keep; what stands in its place names what it wants kept."""
    return linear(c, features, bias, name, _kept_dot)(x)


def _kept_dot(*args, **more) -> jax.Array:
    return kept(jax.lax.dot_general(*args, **more))


def norm(c: Config, name: str | None = None) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=c.norm_eps, dtype=c.dtype, param_dtype=c.param_dtype, name=name)


class Rope(NamedTuple):
    """Angles of every token's position, f32 [B, T, H/2], and where the cache is written."""

    cos: jax.Array
    sin: jax.Array
    index: jax.Array | None


class CoreAttention(nn.Module):
    """Attention after rope, a module of its own so that methods can stand before it.

    q [B, T, N, H]; k and v [B, K, S, H]; `where` says what each key is, `window` how far back this layer sees: a
    number where all layers see as far.
    """

    in_order: bool = False  # no query sees a key behind its own
    form: str = "auto"

    def __call__(self, q, k, v, where: Where, window):
        return attention(q, k, v, where, window=window, in_order=self.in_order, form=self.form)


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x_BxTxD, where: Where, rope: Rope, layer, cache):
        c = self.config
        b, t, _ = x_BxTxD.shape
        q = product(c, c.heads * c.head_size, c.attention_bias, "q_proj", x_BxTxD)
        k = product(c, c.kv_heads * c.head_size, c.attention_bias, "k_proj", x_BxTxD)
        v = product(c, c.kv_heads * c.head_size, c.attention_bias, "v_proj", x_BxTxD)
        q = q.reshape(b, t, c.heads, c.head_size)
        k = k.reshape(b, t, c.kv_heads, c.head_size)
        v = v.reshape(b, t, c.kv_heads, c.head_size)
        if c.qk_norm:
            q, k = norm(c, "q_norm")(q), norm(c, "k_norm")(k)
        q_roped, k_roped = rotate(q, rope.cos, rope.sin), rotate(k, rope.cos, rope.sin)
        if all(c.rope_layers):
            q, k = q_roped, k_roped
        else:
            q, k = jnp.where(layer["rope"], q_roped, q), jnp.where(layer["rope"], k_roped, k)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, S, H], as the cache and the products want it
        if cache is not None:
            at = (layer["number"], 0, 0, rope.index, 0)
            cache = tuple(
                jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), at)
                for old, new in zip(cache, (k, v), strict=True)
            )
            k, v = (jax.lax.dynamic_index_in_dim(x, layer["number"], 0, keepdims=False) for x in cache)
        first, *others = set(c.windows)
        window = layer["window"] if others else None if first == NO_WINDOW else first
        y = CoreAttention(cache is None, c.attention, name="core_attn")(q, k, v, where, window)
        y = y.reshape(b, t, c.heads * c.head_size)
        return product(c, c.hidden, c.output_bias, "o_proj", y), cache


class Mlp(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x_BxTxD):
        c = self.config
        gate = product(c, c.feed_forward, c.mlp_bias, "gate_proj", x_BxTxD)
        up = product(c, c.feed_forward, c.mlp_bias, "up_proj", x_BxTxD)
        return product(c, c.hidden, c.mlp_bias, "down_proj", ACTIVATIONS[c.activation](gate) * up)


class Layer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, carry, layer, where: Where, rope: Rope):
        c = self.config
        h, cache = carry
        h = checkpoint_name(h, "layer_input")
        x, cache = Attention(c, name="self_attn")(norm(c, "input_layernorm")(h), where, rope, layer, cache)
        h = h + x
        h = h + Mlp(c, name="mlp")(norm(c, "post_attention_layernorm")(h))
        return (h, cache), None


class Unrolled(nn.Module):
    """Layers named "0", "1", ... as in Hugging Face's tree."""

    config: Config

    @nn.compact
    def __call__(self, carry, layers, where: Where, rope: Rope):
        for i in range(self.config.layers):
            layer = jax.tree.map(lambda x, i=i: x[i], layers)
            carry, _ = _remat(self.config)(self.config, name=str(i))(carry, layer, where, rope)
        return carry, None


def _remat(c: Config) -> type[nn.Module]:
    policy = REMAT[c.remat]
    return Layer if policy is None else nn.remat(Layer, prevent_cse=not c.scan, policy=policy)


class Decoder(nn.Module):
    config: Config

    def setup(self):
        c = self.config
        self.embed_tokens = nn.Embed(c.vocab, c.hidden, dtype=c.dtype, param_dtype=c.param_dtype)
        if c.scan:
            scanned = nn.scan(
                _remat(c),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=c.layers,
            )
            self.layers = scanned(c)
        else:
            self.layers = Unrolled(c)
        self.norm = norm(c)

    def __call__(self, inputs, positions=None, segment_ids=None, cache=None):
        c = self.config
        tokens = jnp.issubdtype(inputs.dtype, jnp.integer)
        h = self.embed_tokens(inputs) if tokens else inputs.astype(c.dtype)
        b, t = h.shape[:2]
        if positions is None:
            start = 0 if cache is None else cache["index"]
            positions = jnp.broadcast_to((start + jnp.arange(t))[None], (b, t))
        if segment_ids is None:
            segment_ids = jnp.ones((b, t), jnp.int32)
        k_positions, k_segments, index = positions, segment_ids, None
        if cache is not None:
            index = cache["index"]
            k_positions = jax.lax.dynamic_update_slice(cache["positions"], positions, (0, index))
            k_segments = jax.lax.dynamic_update_slice(cache["segment_ids"], segment_ids, (0, index))
        angles = positions[:, :, None].astype(jnp.float32) * jnp.asarray(c.inv_freq)[None, None]
        where = Where(positions, segment_ids, k_positions, k_segments)
        rope = Rope(jnp.cos(angles) * c.rope_scale, jnp.sin(angles) * c.rope_scale, index)
        layers = {
            "number": jnp.arange(c.layers, dtype=jnp.int32),
            "rope": jnp.asarray(c.rope_layers),
            "window": jnp.asarray(c.windows, jnp.int32),
        }
        (h, keys), _ = self.layers((h, cache and (cache["k"], cache["v"])), layers, where, rope)
        if cache is not None:
            cache = {
                "k": keys[0],
                "v": keys[1],
                "positions": k_positions,
                "segment_ids": k_segments,
                "index": index + t,
            }
        return self.norm(h), cache


class TiedHead(nn.Module):
    """The output head that is the input table."""

    def __call__(self, h_BxTxD, table: nn.Embed):
        return table.attend(h_BxTxD)


class Llama(nn.Module):
    """Tokens [B, T] or embeddings [B, T, D] -> logits [B, T, V]; [B, T, labels] of a classifier."""

    config: Config

    def setup(self):
        c = self.config
        self.model = Decoder(c)
        if c.labels:
            self.score = linear(c, c.labels, False)
        else:
            self.lm_head = TiedHead() if c.tied else linear(c, c.vocab, False)

    def __call__(self, inputs, positions=None, segment_ids=None):
        return self.head(self.hidden(inputs, positions, segment_ids)[0])

    def hidden(self, inputs, positions=None, segment_ids=None, cache=None):
        """(final hidden states [B, T, D], of a classifier each segment's own at all its places; the cache with these
        tokens in it)."""
        h, cache = self.model(inputs, positions, segment_ids, cache)
        if self.config.labels:
            segment_ids = jnp.ones(h.shape[:2], jnp.int32) if segment_ids is None else segment_ids
            h = pool(self.config.pooling, h, segment_ids)
        return h, cache

    def head(self, h_BxTxD):
        """Hidden states -> logits."""
        if self.config.labels:
            return self.score(h_BxTxD)
        if self.config.tied:
            return self.lm_head(h_BxTxD, self.model.embed_tokens)
        return self.lm_head(h_BxTxD)

    def init_cache(self, batch: int, length: int) -> dict[str, jax.Array]:
        """An empty cache for `length` tokens a row; segment 0 marks what is not filled."""
        c = self.config
        shape = (c.layers, batch, c.kv_heads, length, c.head_size)
        return {
            "k": jnp.zeros(shape, c.dtype),
            "v": jnp.zeros(shape, c.dtype),
            "positions": jnp.zeros((batch, length), jnp.int32),
            "segment_ids": jnp.zeros((batch, length), jnp.int32),
            "index": jnp.int32(0),
        }
