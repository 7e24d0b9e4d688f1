"""LoHa: the update is the Hadamard product of two low-rank products, of rank up to rank² (Hyeon-Woo et al., 2021).

  y  = x W + s x (A1 B1 ⊙ A2 B2)          s = alpha / rank
  W' = W + s (A1 B1 ⊙ A2 B2)

  a1    : [in, rank]   trainable f32, U(±1/sqrt(in))
  b1    : [rank, out]  trainable f32, U(±1/sqrt(rank))
  a2    : [in, rank]   trainable f32, zeros
  b2    : [rank, out]  trainable f32, U(±1/sqrt(rank))
  scale : []           frozen f32, s

Identity at init. Trainable per site: 2 rank (in + out).
Learning rate: 1e-4 to 1e-3 (PEFT's MetaMathQA run: 1e-4, which learns slowly there).
Source: https://arxiv.org/abs/2108.06098, proposition 1; on top of a frozen kernel as in LyCORIS,
https://arxiv.org/abs/2309.14859.
Departs: where rank² (in + out) < in out, x goes through the pairs of ranks and the update is never made; else it is
made anew in the backward pass, where Hugging Face PEFT keeps it. A convolution's kernel is the matrix of its patches,
without the third factor that use_effective_conv2d gives it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import hf, lift
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Patterns, Targets, by_pattern
from peftax.ops.product import linear, matmul

AXES = {"a1": ("in", "rank"), "b1": ("rank", "out"), "a2": ("in", "rank"), "b2": ("rank", "out"), "scale": ()}


def loha(
    *,
    rank: int = 8,  # r of each of the two products
    alpha: float = 8.0,  # numerator of the scale
    dropout: float = 0.0,  # probability that an output of a site's update is dropped; PEFT's rank_dropout
    module_dropout: float = 0.0,  # probability that a site's update is left out whole
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    rank_pattern: Patterns = None,  # {regex on the end of the name: rank there}, or pairs
    alpha_pattern: Patterns = None,  # the same for alpha
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Low-rank Hadamard product beside every target."""
    config = dict(locals())
    for r in (rank, *dict(rank_pattern or {}).values()):
        if r < 1:
            raise ValueError(f"loha: rank {r} must be at least 1")
    for key, rate in (("dropout", dropout), ("module_dropout", module_dropout)):
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"loha: {key} {rate} must lie in [0, 1)")
    whole = modules_to_save or ()
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=whole, kinds=("linear", "conv", "head"))

    def settings(name: str, kind: str) -> dict[str, Any]:
        r = by_pattern(rank_pattern, name, rank)
        return {"rank": r, "scale": by_pattern(alpha_pattern, name, alpha) / r}

    def init(key, k: Kernel, *, rank: int, scale: float):
        (n_in, n_out), keys = k.w.shape, jax.random.split(key, 3)

        def uniform(key, shape, fan_in):
            return jax.random.uniform(key, shape, minval=-1 / math.sqrt(fan_in), maxval=1 / math.sqrt(fan_in))

        leaves = {
            "a1": uniform(keys[0], (n_in, rank), n_in),
            "b1": uniform(keys[1], (rank, n_out), rank),
            "a2": jnp.zeros((n_in, rank)),
            "b2": uniform(keys[2], (rank, n_out), rank),
        }
        return {"trainable": leaves, "frozen": {"scale": jnp.float32(scale)}}

    @jax.checkpoint  # or arrays as large as the kernel would be kept for the backward pass
    def update(x, a1, b1, a2, b2):
        (n_in, r), n_out = a1.shape, b1.shape[-1]
        if r * r * (n_in + n_out) >= n_in * n_out:
            return matmul(x, matmul(a1, b1) * matmul(a2, b2))
        # the same sum over pairs of ranks: a product of rank r², without an array of the kernel's size
        left = (a1[:, :, None] * a2[:, None, :]).reshape(n_in, r * r)
        right = (b1[:, None, :] * b2[None, :, :]).reshape(r * r, n_out)
        return matmul(matmul(x, left), right)

    def call(theta, x, k: Kernel, ctx: Ctx):
        more = update(x, *(theta[leaf] for leaf in ("a1", "b1", "a2", "b2"))) * theta["scale"]
        return linear(x, k.w, k.b) + ctx.drop_outputs(more, dropout, module_dropout)

    def fold(theta, k: Kernel) -> Kernel:
        update = (theta["a1"] @ theta["b1"]) * (theta["a2"] @ theta["b2"])
        return k.replace(w=k.w + theta["scale"] * update)

    adapted = lift.per_kernel(
        "loha",
        init=init,
        call=call,
        fold=fold,
        axes=AXES,
        settings=settings,
        targets=target,
        draws=dropout > 0 or module_dropout > 0,
        pads=True,
        adapter=adapter,
    )
    return lift.with_base(adapted, target, config=config)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **hf.read_targets(config),
        "rank": config.get("r", 8),
        "alpha": config.get("alpha", 8),
        "dropout": config.get("rank_dropout", 0.0),
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
        "rank_dropout": config["dropout"],
        "module_dropout": config["module_dropout"],
        "rank_pattern": dict(config["rank_pattern"] or {}),
        "alpha_pattern": dict(config["alpha_pattern"] or {}),
        "init_weights": True,
    }


_KEYS = {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"}


def _opened(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if found := next((key for key in tensors if key.endswith(".hada_t1")), None):
        raise hf.Unsupported(
            f"LOHA with use_effective_conv2d (a third factor, {found!r}) is not supported; the nearest is loha of the "
            "convolution's patches, use_effective_conv2d false"
        )
    return dict(tensors)


HF = hf.Format(
    peft_type="LOHA",
    keys=dict.fromkeys(("linear", "head", "conv"), _KEYS),
    patches=("a1", "a2"),
    takes=lambda window: len(window) in (1, 2),
    read=_read,
    write=_write,
    opened=_opened,
)
