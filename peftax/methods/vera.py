"""VeRA: random projections that all sites share, and two trainable vectors a site (Kopiczko et al., 2023).

  y  = x W + ((x A) ⊙ d) B ⊙ b          A, B: the rows of `down` and columns of `up` that the site needs
  W' = W + A diag(d) B diag(b)

  d    : [rank]              trainable f32, d_initial
  b    : [out]               trainable f32, zeros
  down : [widest in, rank]   frozen f32, shared by all sites, U(±sqrt(6 / widest in)), from `seed`
  up   : [rank, widest out]  frozen f32, shared by all sites, U(±sqrt(6 / rank)), from `seed`

Identity at init. Trainable per site: rank + out.
Learning rate: 1e-3 to 3e-3 (PEFT's MetaMathQA runs: 1e-3; PVeRA, its variant: 3e-3).
Source: https://arxiv.org/abs/2310.11454, eq. 2 and section 3.2.
Departs: A and B are the numbers that Hugging Face PEFT draws from the same seed, so that files of either need not
hold them; they are sliced for smaller sites, as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from peftax.core import draws, hf, lift
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Targets
from peftax.ops.product import last, linear, matmul

AXES = {"d": ("rank",), "b": ("out",), "down": ("widest_in", "rank"), "up": ("rank", "widest_out")}


def vera(
    *,
    rank: int = 256,  # r
    d_initial: float = 0.1,  # what d begins with
    seed: int = 0,  # of the shared projections; Hugging Face's projection_prng_key
    dropout: float = 0.0,  # probability, on the input of A
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    bias: str = "none",  # "none" | "all" | "vera_only": which of the base's biases train
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Vector-based random matrix adaptation."""
    config = dict(locals())
    if rank < 1:
        raise ValueError(f"vera: rank {rank} must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"vera: dropout {dropout} must lie in [0, 1)")
    whole = modules_to_save or ()
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=whole, kinds=("linear",))

    def init(key, k: Kernel):
        return {"trainable": {"d": jnp.full((rank,), d_initial, jnp.float32), "b": jnp.zeros((k.w.shape[1],))}}

    def shared(key, shapes: Sequence[tuple[int, int]]):
        widest_in, widest_out = (max(sizes) for sizes in zip(*shapes, strict=True))
        draw, down, up = draws.Generator(seed), draws.kaiming_bound(widest_in), draws.kaiming_bound(rank)
        down = draw.uniform((rank, widest_in), -down, down).T
        up = draw.uniform((widest_out, rank), -up, up).T
        return {"frozen": {"down": jnp.asarray(down), "up": jnp.asarray(up)}}

    def projections(theta, k: Kernel):
        n_in, n_out = k.w.shape
        return theta["down"][:n_in], theta["up"][:, :n_out]

    def call(theta, x, k: Kernel, ctx: Ctx):
        a, b = projections(theta, k)
        low = matmul(ctx.drop(x, dropout), a)
        more = matmul(low * last(theta["d"], low), b)
        return linear(x, k.w, k.b) + more * last(theta["b"], more)

    def fold(theta, k: Kernel) -> Kernel:
        a, b = projections(theta, k)
        return k.replace(w=k.w + (a * last(theta["d"], a)) @ b * last(theta["b"], b))

    adapted = lift.per_kernel(
        "vera",
        init=init,
        call=call,
        fold=fold,
        shared=shared,
        axes=AXES,
        settings=lambda name, kind: {},
        targets=target,
        draws=dropout > 0,
        adapter=adapter,
    )
    return lift.with_base(adapted, target, bias=bias, config=config)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **hf.read_targets(config),
        "rank": config.get("r", 256),
        "d_initial": config.get("d_initial", 0.1),
        "seed": config.get("projection_prng_key", 0),
        "dropout": config.get("vera_dropout", 0.0),
        "bias": config.get("bias", "none"),
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **hf.write_targets(config, known=("layers",)),
        "r": config["rank"],
        "d_initial": config["d_initial"],
        "projection_prng_key": config["seed"],
        "save_projection": True,
        "vera_dropout": config["dropout"],
        "bias": config["bias"],
        "init_weights": True,
    }


HF = hf.Format(
    peft_type="VERA",
    keys={"linear": {"d": "vera_lambda_d", "b": "vera_lambda_b"}},
    shared={"down": "base_model.vera_A", "up": "base_model.vera_B"},
    read=_read,
    write=_write,
)
