"""LoRA: a trainable low-rank update beside each frozen kernel (Hu et al., 2021).

  y  = x W + s (x A) B          s = alpha / rank,  with rank_stabilized alpha / sqrt(rank)
  W' = W + s A B

  a      : [in, rank]   trainable f32, init_scale times U(±1/sqrt(in)) or as `init` says; zeros on an embedding;
                        frozen with `freeze_a`
  b      : [rank, out]  trainable f32, zeros or as `init` says; N(0, 1) on an embedding
  scale  : []           frozen f32, s
  a0, b0 : as a, b      frozen f32, what moved the base; only where `init` moves it

Identity at init. Trainable per site: rank (in + out); with `freeze_a` rank out.
Learning rate: 1e-4 to 1e-3 (paper, appendix D: 1e-4 to 5e-4; "LoRA Without Regret": ten times full fine-tuning's).
Source: https://arxiv.org/abs/2106.09685, eq. 3; rank_stabilized: https://arxiv.org/abs/2312.03732, eq. 4.
Departs: dropout acts on x before A, as in microsoft/LoRA and Hugging Face PEFT; the paper has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import hf, lift, rows
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Patterns, Targets, by_pattern
from peftax.methods import inits
from peftax.ops.product import linear, matmul, narrow
from peftax.ops.qtensor import dense

AXES = {"a": ("in", "rank"), "b": ("rank", "out"), "scale": (), "a0": ("in", "rank"), "b0": ("rank", "out")}


def lora(
    *,
    rank: int = 8,  # r
    alpha: float = 16.0,  # numerator of the scale
    rank_stabilized: bool = False,  # scale by alpha / sqrt(rank) instead of alpha / rank
    dropout: float = 0.0,  # probability, on the input of A
    init: str = "kaiming",  # where linear sites start: a file of methods/inits; pissa and olora move the base
    init_scale: float = 1.0,  # times the start of A
    freeze_a: bool = False,  # LoRA-FA: only B trains, best with config.optimizer.name="lora_fa"
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    rank_pattern: Patterns = None,  # {regex on the end of the name: rank there}, or pairs
    alpha_pattern: Patterns = None,  # the same for alpha
    bias: str = "none",  # "none" | "all" | "lora_only": which of the base's biases train
    tokens: rows.Tokens = (),  # ids whose rows of the embedding train too | {module: ids}; see trainable_tokens
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Low-rank adaptation of every target."""
    config = dict(locals())
    if rank < 1:
        raise ValueError(f"lora: rank {rank} must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"lora: dropout {dropout} must lie in [0, 1)")
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=tuple(modules_to_save or ()))
    begin = inits.module(init)

    def settings(name: str, kind: str) -> dict[str, Any]:
        r = by_pattern(rank_pattern, name, rank)
        alpha_here = by_pattern(alpha_pattern, name, alpha)
        return {"rank": r, "scale": alpha_here / (math.sqrt(r) if rank_stabilized else r)}

    def start(key, k: Kernel, *, rank: int, scale: float):
        n_in, n_out = k.w.shape
        frozen = {"scale": jnp.float32(scale)}
        if k.kind == "embed":
            a, b = jnp.zeros((n_in, rank)), jax.random.normal(key, (rank, n_out))
        else:
            which = begin if k.kind == "linear" else inits.module("kaiming")
            a, b = getattr(which, which.__name__.rpartition(".")[2])(key, dense(k.w), rank, scale)
            a = init_scale * a
        if begin.MOVES:
            still = 1.0 if k.kind == "linear" else 0.0
            frozen |= {"a0": still * a, "b0": still * b}
        if not freeze_a:
            return {"trainable": {"a": a, "b": b}, "frozen": frozen}
        if k.kind == "embed":
            raise ValueError("lora: freeze_a would leave nothing to learn on an embedding, whose A starts at zero")
        return {"trainable": {"b": b}, "frozen": {**frozen, "a": a}}

    def call(theta, x, k: Kernel, ctx: Ctx):
        if k.kind == "embed":
            low = matmul(x, theta["a"])
        else:
            low = narrow(ctx.drop(x, dropout), theta["a"])
        return linear(x, k.w, k.b) + narrow(low, theta["b"]) * theta["scale"]

    def fold(theta, k: Kernel) -> Kernel:
        return k.replace(w=k.w + theta["scale"] * (theta["a"] @ theta["b"]))

    def move(theta, k: Kernel) -> Kernel:
        return k.replace(w=k.w - theta["scale"] * (theta["a0"] @ theta["b0"]))

    adapted = lift.per_kernel(
        "lora",
        init=start,
        call=call,
        fold=fold,
        move=move if begin.MOVES else None,
        axes=AXES,
        settings=settings,
        targets=target,
        draws=dropout > 0,
        adapter=adapter,
    )
    trained = rows.beside("lora", tokens, target, adapter=adapter)
    return lift.with_base(adapted, target, bias=bias, beside=trained, config=config)


UNSUPPORTED = {
    "lora_bias": "a bias on B",
    "use_bdlora": "bdlora",
    "use_qalora": "qalora",
    "alora_invocation_tokens": "alora",
    "arrow_config": "arrow",
    "kasa_config": "kasa",
    "velora_config": "velora",
    "monteclora_config": "monteclora",
    "target_parameters": "target_parameters",
    "layer_replication": "layer_replication",
}


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    hf.refuse(config, UNSUPPORTED, "plain lora")
    start = config.get("init_lora_weights", True)
    if start in ("corda", "loftq", "lora_ga"):
        raise hf.Unsupported(
            f"LORA with init_lora_weights={start!r} stands on a moved base that its folder does not hold; save it "
            "with path_initial_model_for_weight_conversion, as plain lora"
        )
    moved = {"pissa": "pissa", "olora": "olora"}
    if str(start).startswith("pissa_niter_"):
        raise hf.Unsupported(
            f"LORA with init_lora_weights={start!r} stands on a base moved by random numbers; save it with "
            "path_initial_model_for_weight_conversion, as plain lora"
        )
    return {
        **hf.read_targets(config),
        "rank": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "rank_stabilized": config.get("use_rslora", False),
        "dropout": config.get("lora_dropout", 0.0),
        "init": moved.get(start, "kaiming"),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "bias": config.get("bias", "none"),
        "tokens": config.get("trainable_token_indices") or (),
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    tables = {module: list(ids) for module, ids in rows.by_table(config["tokens"]).items()}
    return {
        **hf.write_targets(config),
        "r": config["rank"],
        "lora_alpha": config["alpha"],
        "use_rslora": config["rank_stabilized"],
        "lora_dropout": config["dropout"],
        "rank_pattern": dict(config["rank_pattern"] or {}),
        "alpha_pattern": dict(config["alpha_pattern"] or {}),
        "bias": config["bias"],
        "trainable_token_indices": tables.get("", tables) or None,
        "init_lora_weights": True,
    }


def _settle(layers: hf.Layers, config: Mapping[str, Any]) -> tuple[hf.Layers, Mapping[str, Any]]:
    """A moved base and rank r as the untouched base and rank 2r: s A B - s A0 B0."""
    if not inits.module(config["init"]).MOVES:
        return layers, config
    # a site that moved nothing holds zeros there
    doubled = {
        name: {
            "a": np.concatenate([leaves["a"], leaves["a0"]], axis=-1),
            "b": np.concatenate([leaves["b"], -leaves["b0"]], axis=-2),
        }
        for name, leaves in layers.items()
    }
    wider = math.sqrt(2) if config["rank_stabilized"] else 2  # keeps the scale

    def each(patterns: Patterns, factor: float) -> dict[str, Any]:
        return {pattern: factor * value for pattern, value in dict(patterns or {}).items()}

    return doubled, {
        **config,
        "init": "kaiming",
        "rank": 2 * config["rank"],
        "alpha": wider * config["alpha"],
        "rank_pattern": each(config["rank_pattern"], 2),
        "alpha_pattern": each(config["alpha_pattern"], wider),
    }


_TOKENS = "token_adapter.trainable_tokens_delta"

HF = hf.Format(
    peft_type="LORA",
    matches=lambda config: not config.get("use_dora"),
    keys={
        "linear": {"a": "lora_A.weight", "b": "lora_B.weight", "columns": _TOKENS},
        "conv": {"a": "lora_A.weight", "b": "lora_B.weight"},
        "head": {"a": "lora_A.weight", "b": "lora_B.weight"},
        "embed": {"a": "lora_embedding_A", "b": "lora_embedding_B", "rows": _TOKENS},
    },
    straight=("rows",),
    read=_read,
    write=_write,
    settle=_settle,
)
