"""LoKr: the update is a Kronecker product of two small matrices, of which one may be low-rank (Yeh et al., 2023).

  y  = x W + s x (W1 ⊗ W2)          s = alpha / rank
  W' = W + s (W1 ⊗ W2)              in = in_1 in_2, out = out_1 out_2

  w1     : [in_1, out_1]               trainable f32, zeros; or its factors where `decompose_both` says so:
  a1, b1 : [in_1, rank], [rank, out_1] trainable f32, U(±1/sqrt(in_1)) and zeros
  w2     : [in_2, out_2]               trainable f32, U(±1/sqrt(in_2)), where rank >= max(in_2, out_2) / 2; else
  a2, b2 : [in_2, rank], [rank, out_2] trainable f32, U(±1/sqrt(in_2)) and U(±1/sqrt(rank))
  scale  : []                          frozen f32, s

Identity at init. Trainable per site: in_1 out_1 + min(in_2 out_2, rank (in_2 + out_2)), about.
Learning rate: 1e-3 to 3e-3 (PEFT's MetaMathQA run: 3e-3).
Source: https://arxiv.org/abs/2309.14859, its section on LoKr; sizes as LyCORIS' `factorization`.
Departs: x is multiplied by one factor and then by the other, where Hugging Face PEFT makes the whole update. Linear
sites only. What PEFT calls init_weights="lycoris" is init="w2" here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftax.core import hf, lift
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Patterns, Targets, by_pattern
from peftax.ops.product import linear, narrow

AXES = {
    "w1": ("in_1", "out_1"),
    "a1": ("in_1", "rank"),
    "b1": ("rank", "out_1"),
    "w2": ("in_2", "out_2"),
    "a2": ("in_2", "rank"),
    "b2": ("rank", "out_2"),
    "scale": (),
}


def lokr(
    *,
    rank: int = 8,  # r of what is factored
    alpha: float = 8.0,  # numerator of the scale
    decompose_both: bool = False,  # factor W1 too, where rank < max(in_1, out_1) / 2
    decompose_factor: int = -1,  # in_1 and out_1 where it divides, else the largest below it; -1: near the roots
    init: str = "w1",  # which begins with zeros: "w1" | "w2"
    dropout: float = 0.0,  # probability that an output of a site's update is dropped; PEFT's rank_dropout
    dropout_scale: bool = False,  # those that stay make up for those that are dropped
    module_dropout: float = 0.0,  # probability that a site's update is left out whole
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    rank_pattern: Patterns = None,  # {regex on the end of the name: rank there}, or pairs
    alpha_pattern: Patterns = None,  # the same for alpha
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Low-rank Kronecker product beside every target."""
    config = dict(locals())
    for r in (rank, *dict(rank_pattern or {}).values()):
        if r < 1:
            raise ValueError(f"lokr: rank {r} must be at least 1")
    for key, rate in (("dropout", dropout), ("module_dropout", module_dropout)):
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"lokr: {key} {rate} must lie in [0, 1)")
    if decompose_factor != -1 and decompose_factor < 1:
        raise ValueError(f"lokr: decompose_factor {decompose_factor} must be -1 or at least 1")
    if init not in ("w1", "w2"):
        raise ValueError(f"lokr: init {init!r} is none of 'w1', 'w2'")
    whole = modules_to_save or ()
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=whole, kinds=("linear", "head"))

    def settings(name: str, kind: str) -> dict[str, Any]:
        r = by_pattern(rank_pattern, name, rank)
        return {"rank": r, "scale": by_pattern(alpha_pattern, name, alpha) / r}

    def start(key, k: Kernel, *, rank: int, scale: float):
        (in_1, in_2), (out_1, out_2) = (factorize(n, decompose_factor) for n in k.w.shape)
        keys = jax.random.split(key, 4)

        def uniform(key, shape, fan_in, zero=False):
            bound = 0.0 if zero else 1 / math.sqrt(fan_in)
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        if decompose_both and rank < max(in_1, out_1) / 2:
            a1 = uniform(keys[0], (in_1, rank), in_1)
            leaves = {"a1": a1, "b1": uniform(keys[1], (rank, out_1), rank, init == "w1")}
        else:
            leaves = {"w1": uniform(keys[0], (in_1, out_1), in_1, init == "w1")}
        if rank < max(in_2, out_2) / 2:
            a2 = uniform(keys[2], (in_2, rank), in_2, init == "w2")
            leaves |= {"a2": a2, "b2": uniform(keys[3], (rank, out_2), rank)}
        else:
            leaves["w2"] = uniform(keys[2], (in_2, out_2), in_2, init == "w2")
        return {"trainable": leaves, "frozen": {"scale": jnp.float32(scale)}}

    def call(theta, x, k: Kernel, ctx: Ctx):
        w1 = theta["w1"] if "w1" in theta else theta["a1"] @ theta["b1"]
        more = x.reshape(*x.shape[:-1], len(w1), -1)
        more = narrow(more, theta["w2"]) if "w2" in theta else narrow(narrow(more, theta["a2"]), theta["b2"])
        more = jnp.einsum("...ik,ij->...jk", more, w1 * theta["scale"])
        more = more.reshape(*x.shape[:-1], -1)
        return linear(x, k.w, k.b) + ctx.drop_outputs(more, dropout, module_dropout, even=dropout_scale)

    def fold(theta, k: Kernel) -> Kernel:
        w1, w2 = (theta[f"w{i}"] if f"w{i}" in theta else theta[f"a{i}"] @ theta[f"b{i}"] for i in (1, 2))
        return k.replace(w=k.w + theta["scale"] * jnp.kron(w1, w2))

    adapted = lift.per_kernel(
        "lokr",
        init=start,
        call=call,
        fold=fold,
        axes=AXES,
        settings=settings,
        targets=target,
        draws=dropout > 0 or module_dropout > 0,
        adapter=adapter,
    )
    return lift.with_base(adapted, target, config=config)


def factorize(n: int, factor: int) -> tuple[int, int]:
    """n as two factors, the first no larger: `factor` where it divides n; else of the divisors up to it (-1: of all)
    the pair that is nearest to the root.
    """
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    limit = math.isqrt(n) if factor == -1 else min(factor, math.isqrt(n))
    small = next(d for d in range(limit, 0, -1) if n % d == 0)
    return small, n // small


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **hf.read_targets(config),
        "rank": config.get("r", 8),
        "alpha": config.get("alpha", 8),
        "decompose_both": config.get("decompose_both", False),
        "decompose_factor": config.get("decompose_factor", -1),
        "init": "w2" if config.get("init_weights") == "lycoris" else "w1",
        "dropout": config.get("rank_dropout", 0.0),
        "dropout_scale": config.get("rank_dropout_scale", False),
        "module_dropout": config.get("module_dropout", 0.0),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = hf.write_targets(config)
    del fields["fan_in_fan_out"]
    return {
        **fields,
        "r": config["rank"],
        "alpha": config["alpha"],
        "decompose_both": config["decompose_both"],
        "decompose_factor": config["decompose_factor"],
        "rank_dropout": config["dropout"],
        "rank_dropout_scale": config["dropout_scale"],
        "module_dropout": config["module_dropout"],
        "rank_pattern": dict(config["rank_pattern"] or {}),
        "alpha_pattern": dict(config["alpha_pattern"] or {}),
        "init_weights": "lycoris" if config["init"] == "w2" else True,
    }


_KEYS = {
    "w1": "lokr_w1",
    "a1": "lokr_w1_b",
    "b1": "lokr_w1_a",
    "w2": "lokr_w2",
    "a2": "lokr_w2_b",
    "b2": "lokr_w2_a",
}

HF = hf.Format(peft_type="LOKR", keys={"linear": _KEYS, "head": _KEYS}, read=_read, write=_write)
