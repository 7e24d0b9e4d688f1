"""Compacter: bottleneck adapters whose matrices are sums of few Kronecker products (Mahabadi et al., 2021).

  y = f(x) + σ(f(x) D + d) U + u        f: attention and feed-forward; "++": targets=("mlp",)
  D = Σ_i A_i ⊗ (S_i T_i)               i = 1 .. n; U the same with factors of its own and the same A

  a         : [n, n, n]          trainable f32, shared by all blocks, N(0, a_std²)
  down_s    : [n, out/n, rank]   trainable f32, U(±√2 √(6 / (out/n + rank))), Glorot's with a gain
  down_t    : [n, rank, size/n]  trainable f32, the same: U(±√2 √(6 / (size/n + rank)))
  up_s      : [n, size/n, rank]  trainable f32, as down_t
  up_t      : [n, rank, out/n]   trainable f32, as down_s
  down_bias : [size]             trainable f32, zeros
  up_bias   : [out]              trainable f32, zeros

Not the identity at init, though near it. Trainable per module: 2 rank (out + size) + out + size, and n³ once.
Learning rate: 1e-3 to 3e-3 (the authors' T5 runs: 3e-3).
Source: https://arxiv.org/abs/2106.04647, the Compacter layer, of rank 1 there. T5-base with its 48 blocks, size 24 and
n 4 trains 114,112 numbers: with 47,616 of layer norms the paper's 0.073%.
Departs: layer norms stay frozen (chain with a method that selects them, to train them as the paper does). Nonlinear,
so that nothing folds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from peftax.core import lift
from peftax.core.method import Ctx, Method
from peftax.core.sites import Block, first_output
from peftax.core.targets import Targets
from peftax.ops.product import last

ACTIVATIONS = {"gelu": nn.gelu, "relu": nn.relu, "silu": nn.silu, "tanh": jnp.tanh}
AXES = {
    "a": ("n", "n", "n"),
    "down_s": ("n", "out_share", "rank"),
    "down_t": ("n", "rank", "size_share"),
    "up_s": ("n", "size_share", "rank"),
    "up_t": ("n", "rank", "out_share"),
    "down_bias": ("size",),
    "up_bias": ("out",),
}


def compacter(
    *,
    size: int = 24,  # width of the bottleneck; the paper: 1/32 of the model's
    n: int = 4,  # Kronecker products that a matrix is the sum of; divides size and every target's width
    rank: int = 1,  # of each product's right factor
    a_std: float = 0.01,  # of A's start
    targets: str | Sequence[str] = ("self_attn", "mlp"),  # regex or suffixes of modules
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    activation: str = "gelu",  # "gelu" | "relu" | "silu" | "tanh"
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """A bottleneck of Kronecker products after every target."""
    config = dict(locals())
    for key, value in (("size", size), ("n", n), ("rank", rank)):
        if value < 1:
            raise ValueError(f"compacter: {key} {value} must be at least 1")
    if size % n:
        raise ValueError(f"compacter: n {n} must divide size {size}; the nearest size is {max(1, round(size / n)) * n}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"compacter: activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    target = Targets(modules=targets, exclude=exclude, kinds=("block",))

    def glorot(key, *shape: int):
        bound = math.sqrt(2 * 6 / (shape[-2] + shape[-1]))
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    def init(key, block: Block):
        width = block.shape[1]
        if width % n:
            fits = ", ".join(str(d) for d in range(1, 2 * n + 1) if width % d == size % d == 0)
            raise ValueError(f"compacter: n {n} must divide the width {width} of {block.path!r}; these do: {fits}")
        keys = jax.random.split(key, 4)
        leaves = {
            "down_s": glorot(keys[0], n, width // n, rank),
            "down_t": glorot(keys[1], n, rank, size // n),
            "up_s": glorot(keys[2], n, size // n, rank),
            "up_t": glorot(keys[3], n, rank, width // n),
            "down_bias": jnp.zeros(size),
            "up_bias": jnp.zeros(width),
        }
        return {"trainable": leaves}

    def shared(key, blocks):
        return {"trainable": {"a": a_std * jax.random.normal(key, (n, n, n))}}

    def kronecker(x, a, s, t):
        """x Σ_i A_i ⊗ (S_i T_i), by its factors: [..., n m] -> [..., n k]."""
        rows = x.reshape(*x.shape[:-1], n, -1)
        low = jnp.einsum("...am,imr->...iar", rows, s)
        low = jnp.einsum("...iar,iab->...ibr", low, a)
        return jnp.einsum("...ibr,irk->...bk", low, t).reshape(*x.shape[:-1], -1)

    def call(theta, run, args, ctx: Ctx):
        out = run(*args)
        y = first_output(out)
        low = kronecker(y, theta["a"], theta["down_s"], theta["down_t"])
        low = ACTIVATIONS[activation](low + last(theta["down_bias"], low))
        more = kronecker(low, theta["a"], theta["up_s"], theta["up_t"])
        y = y + more + last(theta["up_bias"], more)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    return lift.per_block(
        "compacter",
        init=init,
        call=call,
        shared=shared,
        axes=AXES,
        settings=lambda name, kind: {},
        targets=target,
        adapter=adapter,
        config=config,
    )
