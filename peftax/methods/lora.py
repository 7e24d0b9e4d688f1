"""LoRA: a trainable low-rank update beside each frozen kernel (Hu et al., 2021).

  y  = x W + s (x A) B          s = alpha / rank,  with rank_stabilized alpha / sqrt(rank)
  W' = W + s A B                with `b_bias`: y + s c,  bias' = bias + s c

  a      : [in, rank]   trainable f32, init_scale times U(±1/sqrt(in)) or as `init` says; zeros on an embedding;
                        frozen with `freeze_a`
  b      : [rank, out]  trainable f32, zeros or as `init` says; N(0, 1) on an embedding
  c      : [out]        trainable f32, zeros; only with `b_bias`
  scale  : []           frozen f32, s
  a0, b0 : as a, b      frozen f32, what moved the base; only where `init` moves it

Identity at init. Trainable per site: rank (in + out); with `freeze_a` rank out.
`b_bias` adds out to that.
Learning rate: 1e-4 to 1e-3 (paper, appendix D: 1e-4 to 5e-4; "LoRA Without Regret": ten times full fine-tuning's).
Source: https://arxiv.org/abs/2106.09685, eq. 3; rank_stabilized: https://arxiv.org/abs/2312.03732, eq. 4.
Departs: dropout acts on x before A, as in microsoft/LoRA and Hugging Face PEFT; the paper has none. On stacked experts
it acts on each expert's x, which PEFT has no form for: such folders say 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import hf, lift, rows
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Patterns, Targets, by_pattern, low_rank
from peftax.methods import inits
from peftax.ops.product import last, linear, matmul, narrow
from peftax.ops.qtensor import dense

AXES = {"a": ("in", "rank"), "b": ("rank", "out"), "c": ("out",), "scale": ()}
AXES |= {"a0": AXES["a"], "b0": AXES["b"]}
SINCE = "0.19.0"  # of PEFT, the layout of stacked experts


def lora(
    *,
    rank: int = 8,  # r
    alpha: float = 16.0,  # numerator of the scale
    rank_stabilized: bool = False,  # scale by alpha / sqrt(rank) instead of alpha / rank
    dropout: float = 0.0,  # probability, on the input of A
    init: str = "kaiming",  # where linear sites start: a file of methods/inits; pissa and olora move the base
    init_scale: float = 1.0,  # times the start of A
    freeze_a: bool = False,  # LoRA-FA: only B trains, best with config.optimizer.name="lora_fa"
    b_bias: bool = False,  # B has a trainable bias
    targets: str | Sequence[str] | None = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    parameters: Sequence[str] = (),  # besides: names and suffixes of parameters, such as stacked experts'
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
    for r in (rank, *dict(rank_pattern or {}).values()):
        if r < 1:
            raise ValueError(f"lora: rank {r} must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"lora: dropout {dropout} must lie in [0, 1)")
    if init == "loftq" and init_scale != 1:
        raise ValueError(
            f"lora: init_scale {init_scale} would spoil init='loftq', whose A B is what rounding took; drop it"
        )
    whole, parameters = modules_to_save or (), tuple(parameters or ())
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=whole, parameters=parameters)
    begin = inits.module(init)

    def settings(name: str, kind: str) -> dict[str, Any]:
        patterns = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
        at = target.parameter(name) or name
        return low_rank(at, rank, alpha, rank_stabilized=rank_stabilized, **patterns)

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
        if freeze_a and k.kind == "embed":
            raise ValueError("lora: freeze_a would leave nothing to learn on an embedding, whose A starts at zero")
        more = {"c": jnp.zeros(n_out)} if b_bias and k.kind != "embed" else {}
        if freeze_a:
            return {"trainable": {"b": b, **more}, "frozen": {**frozen, "a": a}}
        return {"trainable": {"a": a, "b": b, **more}, "frozen": frozen}

    def call(theta, x, k: Kernel, ctx: Ctx):
        if k.kind == "embed":
            low = matmul(x, theta["a"])
        else:
            low = narrow(ctx.drop(x, dropout), theta["a"])
        update = narrow(low * theta["scale"], theta["b"])  # scaled while short: slopes need no copy of dy
        if "c" in theta:
            update = update + last(theta["c"] * theta["scale"], update)
        return linear(x, k.w, k.b) + update

    def fold(theta, k: Kernel) -> Kernel:
        w = k.w + theta["scale"] * (theta["a"] @ theta["b"])
        if "c" not in theta:
            return k.replace(w=w)
        if k.b is None:
            raise ValueError("lora: a module without a bias has no place for B's (b_bias); do not fold this adapter")
        return k.replace(w=w, b=k.b + theta["scale"] * theta["c"])

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
        pads=True,
        adapter=adapter,
    )
    trained = rows.beside("lora", tokens, target, adapter=adapter)
    return lift.with_base(adapted, target, bias=bias, beside=trained, config=config)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    start = config.get("init_lora_weights", True)
    return {
        **hf.read_lora(
            config,
            honours=("lora_bias", "target_parameters", rows.FIELD),
            starts=("pissa", "olora"),
        ),
        **rows.read(config),
        "parameters": tuple(config.get("target_parameters") or ()),
        "b_bias": bool(config.get("lora_bias")),
        "init": start if start in ("pissa", "olora") else "kaiming",
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    stacks = any(not p.endswith(".weight") for p in config["parameters"])
    return {
        **hf.write_lora({**config, "dropout": 0.0 if stacks else config["dropout"]}),
        **rows.write(config),
        "target_modules": config["targets"] or [],
        "target_parameters": list(config["parameters"]) or None,
        "lora_bias": config["b_bias"],
    }


def _settle(layers: hf.Layers, config: Mapping[str, Any]) -> tuple[hf.Layers, Mapping[str, Any]]:
    """A moved base and rank r as the untouched base and rank 2r: s A B - s A0 B0."""
    if not inits.module(config["init"]).MOVES:
        return layers, config
    # a site that moved nothing holds zeros there
    doubled = {
        name: {
            **{leaf: value for leaf, value in leaves.items() if leaf == "c"},
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


# --- stacked experts ------------------------------------------------------------------------------


def _pack(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """a [E, in, r] and b [E, r, out] as lora_A [E r, in], expert by expert, and lora_B [out, r E], rank by rank."""
    a, b = leaves["a"], leaves["b"]
    return {
        "lora_A.weight": a.swapaxes(1, 2).reshape(-1, a.shape[1]),
        "lora_B.weight": b.transpose(2, 1, 0).reshape(b.shape[2], -1),
    }


def _unpack(stacks, shapes, config: Mapping[str, Any]) -> list[dict[str, np.ndarray]]:
    """The inverse, for both of PEFT's layouts.

    Before SINCE PEFT took the second axis of [E, out, in] for the inputs: lora_A was [E r, out] and lora_B [in, r E].
    A file has one layout: the shapes of its first kernel that is not square tell, else the version that wrote it.
    """
    swapped = hf.version(config) < hf.version({"peft_version": SINCE})
    for tensors, shape in zip(stacks, shapes, strict=True):
        n_in, n_out = shape["a"][1], shape["b"][2]
        widths = tensors["lora_A.weight"].shape[-1], tensors["lora_B.weight"].shape[0]
        if n_in != n_out:
            swapped = widths == (n_out, n_in)
            break
    found = []
    for tensors, shape in zip(stacks, shapes, strict=True):
        (n, n_in, rank), n_out = shape["a"], shape["b"][2]
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        first, second = (n_out, n_in) if swapped else (n_in, n_out)
        if a.shape != (n * rank, first) or b.shape != (second, rank * n):
            raise ValueError(
                f"lora: lora_A {a.shape} and lora_B {b.shape} do not fit {n} experts [{n_in}, {n_out}] of rank {rank}, "
                f"which need {(n * rank, first)} and {(second, rank * n)}"
            )
        a, b = a.reshape(n, rank, first), b.reshape(second, rank, n).transpose(2, 1, 0)
        found.append({"a": b.swapaxes(1, 2), "b": a} if swapped else {"a": a.swapaxes(1, 2), "b": b})
    return found


def _by_parameter(config: Mapping[str, Any], experts: Mapping[str, str]) -> dict[str, Any]:
    """The settings where these parameters (parameter: one of its experts' names) are named as such."""
    named = config["parameters"]
    others = {p: name for p, name in experts.items() if not any(f".{p}".endswith(f".{known}") for known in named)}
    patterns = {
        field: {re.escape(p): by_pattern(config[field], name, config[key]) for p, name in others.items()}
        | dict(config[field] or {})
        for field, key in (("rank_pattern", "rank"), ("alpha_pattern", "alpha"))
        if config[field]
    }
    return {**config, **patterns, "parameters": (*named, *others)}


HF = hf.Format(
    peft_type="LORA",
    matches=lambda config: not config.get("use_dora"),
    keys={
        "linear": {"a": "lora_A.weight", "b": "lora_B.weight", "c": "lora_B.bias", "columns": rows.TENSOR},
        **dict.fromkeys(("conv", "head"), {"a": "lora_A.weight", "b": "lora_B.weight", "c": "lora_B.bias"}),
        "embed": {"a": "lora_embedding_A", "b": "lora_embedding_B", "rows": rows.TENSOR},
    },
    straight=("rows",),
    read=_read,
    write=_write,
    settle=_settle,
    windows=("a", "b"),
    stacks=hf.Stacks(leaves=("a", "b"), pack=_pack, unpack=_unpack, settle=_by_parameter, since=SINCE),
)
