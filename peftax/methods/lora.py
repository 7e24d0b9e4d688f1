"""LoRA: a trainable low-rank update beside each frozen kernel (Hu et al., 2021).

  y  = x W + s (x A) B          s = alpha / rank,  with rank_stabilized alpha / sqrt(rank)
  W' = W + s A B

  a     : [in, rank]   trainable f32, U(±1/sqrt(in)); zeros on an embedding
  b     : [rank, out]  trainable f32, zeros; N(0, 1) on an embedding
  scale : []           frozen f32, s

Identity at init. Trainable per site: rank (in + out).
Source: https://arxiv.org/abs/2106.09685, eq. 3; rank_stabilized: https://arxiv.org/abs/2312.03732, eq. 4.
Departs: the paper draws A from a Gaussian; the uniform above is what microsoft/LoRA and Hugging Face PEFT do
(kaiming_uniform with a = sqrt 5). Dropout acts on x before A, as there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftax.core import hf, sites
from peftax.core.method import Ctx, Kernel, Method, chain
from peftax.core.targets import Patterns, Targets, by_pattern
from peftax.ops.product import linear, matmul, narrow

AXES = {"a": ("in", "rank"), "b": ("rank", "out"), "scale": ()}


def lora(
    *,
    rank: int = 8,  # r
    alpha: float = 16.0,  # numerator of the scale
    rank_stabilized: bool = False,  # scale by alpha / sqrt(rank) instead of alpha / rank
    dropout: float = 0.0,  # probability, on the input of A
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    rank_pattern: Patterns = None,  # {regex on the end of the name: rank there}, or pairs
    alpha_pattern: Patterns = None,  # the same for alpha
    bias: str = "none",  # "none" | "all" | "lora_only": which of the base's biases train
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Low-rank adaptation of every target."""
    config = dict(locals())
    if rank < 1:
        raise ValueError(f"lora: rank {rank} must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"lora: dropout {dropout} must lie in [0, 1)")
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"lora: bias {bias!r} is none of 'none', 'all', 'lora_only'")
    target = Targets(modules=targets, exclude=exclude, layers=layers)
    saved = tuple(modules_to_save or ())

    def settings(name: str, kind: str) -> dict[str, Any] | None:
        if any(name == m or name.endswith(f".{m}") for m in saved) or not target.match(name, kind):
            return None
        r = by_pattern(rank_pattern, name, rank)
        alpha_here = by_pattern(alpha_pattern, name, alpha)
        return {"rank": r, "scale": alpha_here / (math.sqrt(r) if rank_stabilized else r)}

    def init(key, k: Kernel, *, rank: int, scale: float):
        n_in, n_out = k.w.shape
        if k.kind == "embed":
            a, b = jnp.zeros((n_in, rank)), jax.random.normal(key, (rank, n_out))
        else:
            bound = 1.0 / math.sqrt(n_in)
            a, b = jax.random.uniform(key, (n_in, rank), minval=-bound, maxval=bound), jnp.zeros((rank, n_out))
        return {"trainable": {"a": a, "b": b}, "frozen": {"scale": jnp.float32(scale)}}

    def call(theta, x, k: Kernel, ctx: Ctx):
        if k.kind == "embed":
            low = matmul(x, theta["a"])
        else:
            low = narrow(_drop(x, dropout, ctx.key), theta["a"])
        return linear(x, k.w, k.b) + narrow(low, theta["b"]) * theta["scale"]

    def fold(theta, k: Kernel) -> Kernel:
        return k.replace(w=k.w + theta["scale"] * (theta["a"] @ theta["b"]))

    adapted = sites.per_kernel("lora", init=init, call=call, fold=fold, axes=AXES, settings=settings, adapter=adapter)

    def whole(name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        if any(module == m or module.endswith(f".{m}") for m in saved):
            return True
        return leaf == "bias" and (bias == "all" or (bias == "lora_only" and settings(module, "linear") is not None))

    trained = sites.select("modules_to_save", whole, required=False, modules=saved)
    return chain(adapted, trained, name="lora", config=config)


def _drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    unsupported = {
        "use_dora": "dora",
        "lora_bias": "a bias on B",
        "use_bdlora": "bdlora",
        "use_qalora": "qalora",
        "alora_invocation_tokens": "alora",
        "arrow_config": "arrow",
        "kasa_config": "kasa",
        "velora_config": "velora",
        "monteclora_config": "monteclora",
        "target_parameters": "target_parameters",
        "trainable_token_indices": "trainable_token_indices",
        "layer_replication": "layer_replication",
    }
    for field, what in unsupported.items():
        if config.get(field):
            raise hf.Unsupported(f"LORA with {field} ({what}) is not supported; the nearest is plain lora")
    return {
        "rank": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "rank_stabilized": config.get("use_rslora", False),
        "dropout": config.get("lora_dropout", 0.0),
        "targets": config["target_modules"],
        "exclude": config.get("exclude_modules"),
        "layers": config.get("layers_to_transform"),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "bias": config.get("bias", "none"),
        "modules_to_save": tuple(config.get("modules_to_save") or ()),
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "r": config["rank"],
        "lora_alpha": config["alpha"],
        "use_rslora": config["rank_stabilized"],
        "lora_dropout": config["dropout"],
        "target_modules": config["targets"],
        "exclude_modules": config["exclude"],
        "layers_to_transform": config["layers"],
        "rank_pattern": dict(config["rank_pattern"] or {}),
        "alpha_pattern": dict(config["alpha_pattern"] or {}),
        "bias": config["bias"],
        "modules_to_save": list(config["modules_to_save"] or ()) or None,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }


HF = hf.Format(
    peft_type="LORA",
    keys={
        "linear": {"a": "lora_A.weight", "b": "lora_B.weight"},
        "conv": {"a": "lora_A.weight", "b": "lora_B.weight"},
        "head": {"a": "lora_A.weight", "b": "lora_B.weight"},
        "embed": {"a": "lora_embedding_A", "b": "lora_embedding_B"},
    },
    read=_read,
    write=_write,
)
