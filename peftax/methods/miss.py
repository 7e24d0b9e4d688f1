"""MiSS: blocks of a kernel share one update, so that x is summed over its blocks first (Kang et al., 2024).

  s(x)[k] = Σ x[i] over the inputs with i mod rank = k
  plain:  y = x W + s(x) D                   W'[i, o] = W[i, o] + D[i mod rank, o]
  mini:   y = x W + [s(x) D, s(x) D, ...]    W'[i, o] = W[i, o] + D[i mod rank, o mod mini_rank]
  bat:    y = x W'                           W'_b = W_b + M_oᵀ (W_b + I)    for every block W_b [rank, rank] of W;
                                             blocks of the same outputs share M_o

  d      : [rank, out]                trainable f32, zeros    plain
  d_mini : [rank, mini_rank]          trainable f32, zeros    mini
  m      : [out / rank, rank, rank]   trainable f32, zeros    bat

Identity at init. Trainable per site: rank out; of mini rank mini_rank.
Learning rate: 2e-5 to 1e-4 (PEFT's example: 2e-5; its MetaMathQA runs: 1e-4).
Source: https://arxiv.org/abs/2409.15371; its first version calls plain Bone.
Departs: nothing; where rank does not divide the inputs the last block is shorter, as in Hugging Face PEFT. bat needs
the dense kernel, whose update is made anew in the backward pass; the others act on x. Linear sites only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftax.core import hf, lift
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Targets
from peftax.ops.product import linear, matmul, narrow
from peftax.ops.qtensor import dense

AXES = {"d": ("rank", "out"), "d_mini": ("rank", "mini_rank"), "m": ("blocks", "rank", "rank")}
VARIANTS = ("plain", "mini", "bat")


def miss(
    *,
    variant: str = "plain",  # "plain" | "mini": outputs share their columns too | "bat": the update depends on W
    rank: int = 64,  # r: inputs of one block; large, since all blocks share it
    mini_rank: int = 1,  # columns of mini's D; divides the outputs
    dropout: float = 0.0,  # probability, on the input of the update; not with bat
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    bias: str = "none",  # "none" | "all" | "miss_only": which of the base's biases train
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Matrix shard sharing beside every target."""
    config = dict(locals())
    if variant not in VARIANTS:
        raise ValueError(f"miss: variant {variant!r} is none of {', '.join(map(repr, VARIANTS))}")
    for key, value in (("rank", rank), ("mini_rank", mini_rank)):
        if value < 1:
            raise ValueError(f"miss: {key} {value} must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"miss: dropout {dropout} must lie in [0, 1)")
    if dropout and variant == "bat":
        raise ValueError("miss: variant 'bat' is a change of the kernel and drops no inputs; set dropout=0.0")
    whole = modules_to_save or ()
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=whole, kinds=("linear", "head"))

    def init(key, k: Kernel):
        n_in, n_out = k.w.shape
        if rank > n_in:
            raise ValueError(f"miss: rank {rank} is more than the {n_in} inputs of a target")
        if variant == "plain":
            return {"trainable": {"d": jnp.zeros((rank, n_out))}}
        if variant == "mini":
            if n_out % mini_rank:
                raise ValueError(f"miss: mini_rank {mini_rank} does not divide the {n_out} outputs of a target")
            return {"trainable": {"d_mini": jnp.zeros((rank, mini_rank))}}
        if n_in % rank or n_out % rank:
            raise ValueError(
                f"miss: rank {rank} must divide both sides of a kernel for 'bat'; one is [{n_in}, {n_out}]"
            )
        return {"trainable": {"m": jnp.zeros((n_out // rank, rank, rank))}}

    def summed(x):
        """[..., in] -> [..., rank]"""
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % rank)])
        return x.reshape(*x.shape[:-1], -1, rank).sum(-2)

    def blockwise(w, m):
        """M_oᵀ (W_b + I) of all blocks, [in, out]."""
        w_b = w.reshape(w.shape[0] // rank, rank, m.shape[0], rank)
        return (jnp.einsum("okq,ikop->iqop", m, w_b) + m.transpose(2, 0, 1)[None]).reshape(w.shape)

    @jax.checkpoint  # or arrays of the kernel's size would be kept for the backward pass
    def update(x, w, m):
        return matmul(x, blockwise(dense(w), m))

    def call(theta, x, k: Kernel, ctx: Ctx):
        y = linear(x, k.w, k.b)
        if variant == "bat":
            return y + update(x, k.w, theta["m"])
        s = summed(ctx.drop(x, dropout))
        if variant == "plain":
            return y + narrow(s, theta["d"])
        return y + jnp.tile(narrow(s, theta["d_mini"]), y.shape[-1] // mini_rank)

    def fold(theta, k: Kernel) -> Kernel:
        n_in, n_out = k.w.shape
        if variant == "bat":
            return k.replace(w=k.w + blockwise(k.w, theta["m"]))
        d = theta["d"] if variant == "plain" else jnp.tile(theta["d_mini"], n_out // mini_rank)
        return k.replace(w=k.w + jnp.tile(d, (-(-n_in // rank), 1))[:n_in])

    adapted = lift.per_kernel(
        "miss",
        init=init,
        call=call,
        fold=fold,
        axes=AXES,
        settings=lambda name, kind: {},
        targets=target,
        draws=dropout > 0,
        adapter=adapter,
        needs="dense" if variant == "bat" else "product",
    )
    return lift.with_base(adapted, target, bias=bias, config=config)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    start = config.get("init_weights", True)
    variant = start if start in ("bat", "mini") else "plain"
    return {
        **hf.read_targets(config),
        "variant": variant,
        "rank": config.get("r", 64),
        "mini_rank": config.get("mini_r", 1),
        "dropout": 0.0 if variant == "bat" else config.get("miss_dropout", 0.0),  # PEFT's bat does not read it
        "bias": config.get("bias", "none").lower(),
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = hf.write_targets(config)
    del fields["fan_in_fan_out"]
    return {
        **fields,
        "init_weights": True if config["variant"] == "plain" else config["variant"],
        "r": config["rank"],
        "mini_r": config["mini_rank"],
        "miss_dropout": config["dropout"],
        "bias": config["bias"].replace("miss", "MiSS"),
    }


_KEYS = dict.fromkeys(AXES, "miss_block")

HF = hf.Format(
    peft_type="MISS",
    keys={"linear": _KEYS, "head": _KEYS},
    straight=("d", "d_mini"),
    read=_read,
    write=_write,
)
