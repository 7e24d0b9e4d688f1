"""HiRA: the frozen kernel times a low-rank matrix, number by number: a high-rank update (Huang et al., 2025).

  y  = x W + x (W ⊙ A B)
  W' = W ⊙ (1 + A B)

  a : [in, rank]   trainable f32, U(±1/sqrt(in)) or as `init` says; zeros on an embedding
  b : [rank, out]  trainable f32, zeros; N(0, 1) on an embedding

Identity at init. Trainable per site: rank (in + out).
Learning rate: 1e-3 to 5e-3 (PEFT's MetaMathQA run: 4.5e-3).
Source: https://openreview.net/forum?id=TwJrTz9cRS, the Hadamard update of its method section; there is no scale.
Departs: W ⊙ A B is made anew in the backward pass, where Hugging Face PEFT keeps it and A B; on an embedding only
the rows that are looked up are made, where PEFT makes the whole table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftax.core import hf, lift
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Targets
from peftax.methods import inits
from peftax.ops.product import linear, matmul
from peftax.ops.qtensor import dense

AXES = {"a": ("in", "rank"), "b": ("rank", "out")}
STARTS = ("kaiming", "gaussian")


def hira(
    *,
    rank: int = 32,  # r
    dropout: float = 0.0,  # probability, on the input of the update
    init: str = "kaiming",  # where A starts: "kaiming" | "gaussian"
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Hadamard high-rank adaptation of every target."""
    config = dict(locals())
    if rank < 1:
        raise ValueError(f"hira: rank {rank} must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"hira: dropout {dropout} must lie in [0, 1)")
    if init not in STARTS:
        raise ValueError(f"hira: init {init!r} is none of {', '.join(map(repr, STARTS))}")
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=modules_to_save or ())

    def start(key, k: Kernel):
        n_in, n_out = k.w.shape
        if k.kind == "embed":
            return {"trainable": {"a": jnp.zeros((n_in, rank)), "b": jax.random.normal(key, (rank, n_out))}}
        a, b = getattr(inits.module(init), init)(key, k.w, rank, 1.0)
        return {"trainable": {"a": a, "b": b}}

    @jax.checkpoint  # or three arrays of the kernel's size would be kept for the backward pass
    def update(x, w, a, b):
        return matmul(x, dense(w) * matmul(a, b))

    def call(theta, x, k: Kernel, ctx: Ctx):
        y = linear(x, k.w, k.b)
        if k.kind == "embed":
            return y + y * matmul(matmul(x, theta["a"]), theta["b"])
        return y + update(ctx.drop(x, dropout), k.w, theta["a"], theta["b"])

    def fold(theta, k: Kernel) -> Kernel:
        return k.replace(w=k.w + k.w * (theta["a"] @ theta["b"]))

    adapted = lift.per_kernel(
        "hira",
        init=start,
        call=call,
        fold=fold,
        axes=AXES,
        settings=lambda name, kind: {},
        targets=target,
        draws=dropout > 0,
        pads=True,
        adapter=adapter,
        needs="dense",
    )
    return lift.with_base(adapted, target, config=config)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {  # rank_pattern: PEFT's config has it and its layers do not read it
        **hf.read_targets(config),
        "rank": config.get("r", 32),
        "dropout": config.get("hira_dropout", 0.0),
        "init": "gaussian" if config.get("init_weights") == "gaussian" else "kaiming",
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **hf.write_targets(config),
        "r": config["rank"],
        "hira_dropout": config["dropout"],
        "init_weights": "gaussian" if config["init"] == "gaussian" else True,
    }


_LINEAR = {"a": "hira_A", "b": "hira_B"}

HF = hf.Format(
    peft_type="HIRA",
    keys={
        "linear": _LINEAR,
        "conv": _LINEAR,
        "head": _LINEAR,
        "embed": {"a": "hira_embedding_A", "b": "hira_embedding_B"},
    },
    windows=("a", "b"),
    read=_read,
    write=_write,
)
