"""BOFT: inputs of a frozen kernel turn by a butterfly of sparse orthogonal matrices (Liu et al., 2023).

  y  = (x B) W ⊙ s + b       B = B_m ... B_2 B_1,  m = factors; x meets B_m first
  W' = B W diag(s)           B_i = P_i diag(R_i1, R_i2, ...) P_iᵀ,  R = (I - A) (I + A)⁻¹,  A = (r - rᵀ) / 2

  r : [factors, blocks, size, size]  trainable f32, zeros; in = blocks size
  s : [one, out]                     trainable f32, ones

P_i brings together, in blocks of `size`, halves of blocks that lie 2^(i-1) halves apart: after m factors every input
has met size 2^(m-1) others. One factor is OFT with s.

Identity at init. Trainable per site: factors in size + out.
Learning rate: 3e-5 to 1e-4 (PEFT's DreamBooth example: 3e-5; its MetaMathQA run, default settings: 1e-4).
Source: https://arxiv.org/abs/2311.06243, its block butterfly factorization and multiplicative dropout; s is PEFT's.
Departs: what each factor adds to x is x (B_i - I), and x is turned, where Hugging Face PEFT makes B. Without its CUDA
extension PEFT takes one factor whatever its config says; peftax takes those of the config. A convolution has no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import hf, lift
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Targets
from peftax.ops.product import last, matmul

AXES = {"r": ("factors", "blocks", "size", "size"), "s": ("one", "out")}


def boft(
    *,
    block_size: int = 4,  # divides the inputs, times 2^(factors - 1) too
    blocks: int | None = None,  # how many a factor has, in place of their size
    factors: int = 1,  # of the butterfly
    dropout: float = 0.0,  # share of the blocks of one factor, drawn anew, that are I for one step; rounded down
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    bias: str = "none",  # "none" | "all" | "boft_only": which of the base's biases train
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Orthogonal butterfly fine-tuning before every target."""
    config = dict(locals())
    for key, value in (("block_size", block_size), ("blocks", blocks), ("factors", factors)):
        if value is not None and value < 1:
            raise ValueError(f"boft: {key} {value} must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"boft: dropout {dropout} must lie in [0, 1)")
    whole = modules_to_save or ()
    kinds = ("linear", "conv", "head")
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=whole, kinds=kinds)

    def init(key, k: Kernel):
        n_in, n_out = k.w.shape
        fit = [d for d in range(1, n_in + 1) if _fits(n_in, d, factors)]
        size = block_size if blocks is None else n_in // blocks
        if size not in fit or (blocks is not None and n_in % blocks):
            what, wanted = ("block_size", block_size) if blocks is None else ("blocks", blocks)
            known = fit if blocks is None else [n_in // d for d in fit]
            near = min(known, key=lambda d: abs(d - wanted), default=None)
            advice = "take fewer factors" if near is None else f"the nearest that does is {near}"
            raise ValueError(f"boft: {what} {wanted} fits no {n_in} inputs with {factors} factors; {advice}")
        shape = (factors, n_in // size, size, size)
        return {"trainable": {"r": jnp.zeros(shape), "s": jnp.ones((1, n_out))}}

    def changes(theta, ctx: Ctx):
        """R - I of every block of every factor, f32."""
        a = (theta["r"] - theta["r"].swapaxes(-1, -2)) / 2
        e = -2 * jnp.linalg.solve(jnp.eye(a.shape[-1])[None, None] + a, a)
        left_out = int(dropout * e.shape[1])
        if ctx.key is None or left_out == 0:
            return e
        which, order = jax.random.split(ctx.key)
        one = jnp.arange(len(e)) == jax.random.randint(which, (), 0, len(e))
        out = one[:, None] & (jax.random.permutation(order, e.shape[1]) < left_out)[None]
        return jnp.where(out[..., None, None], 0, e)

    def call(theta, x, k: Kernel, ctx: Ctx):
        e = changes(theta, ctx)
        y = matmul(turn(x, e, reversed(range(factors))), k.w)
        y = (y * last(theta["s"], y)).astype(y.dtype)
        return y if k.b is None else y + last(k.b, y)

    def fold(theta, k: Kernel) -> Kernel:
        e = changes(theta, Ctx())
        return k.replace(w=turn(k.w.T, e.swapaxes(-1, -2), range(factors)).T * theta["s"])

    adapted = lift.per_kernel(
        "boft",
        init=init,
        call=call,
        fold=fold,
        axes=AXES,
        settings=lambda name, kind: {},
        targets=target,
        draws=dropout > 0,
        adapter=adapter,
        exact=("r", "s"),  # what is near I or 1 would be rounded to it
    )
    return lift.with_base(adapted, target, bias=bias, config=config)


def _fits(n: int, size: int, factors: int) -> bool:
    return n % (size * 2 ** (factors - 1)) == 0 and (factors == 1 or size % 2 == 0)


def turn(x: jax.Array, e: jax.Array, order: Iterable[int]) -> jax.Array:
    """x [..., in] times the factors of this order, each I + e [factors, blocks, size, size] among its own inputs."""
    _, blocks, size, _ = e.shape
    e = e.astype(x.dtype)
    for i in order:
        apart = 2**i  # in halves of a block
        met = x
        if i > 0:
            met = x.reshape(*x.shape[:-1], blocks // apart, 2, apart, size // 2).swapaxes(-2, -3)
        more = jnp.einsum("...kb,kbc->...kc", met.reshape(*x.shape[:-1], blocks, size), e[i])
        if i > 0:
            more = more.reshape(*x.shape[:-1], blocks // apart, apart, 2, size // 2).swapaxes(-2, -3)
        x = x + more.reshape(x.shape)
    return x


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **hf.read_targets(config),
        "block_size": config.get("boft_block_size", 4) or 4,
        "blocks": config.get("boft_block_num") or None,
        "factors": config.get("boft_n_butterfly_factor", 1),
        "dropout": config.get("boft_dropout", 0.0),
        "bias": config.get("bias", "none"),
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **hf.write_targets(config),
        "boft_block_size": 0 if config["blocks"] else config["block_size"],
        "boft_block_num": config["blocks"] or 0,
        "boft_n_butterfly_factor": config["factors"],
        "boft_dropout": config["dropout"],
        "bias": config["bias"],
        "init_weights": True,
    }


def _opened(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """As they are; a config that PEFT did not follow is named."""
    for key, value in tensors.items():
        if key.endswith(".boft_R") and len(value) == 1 < config["factors"]:
            raise ValueError(
                f"boft: {key!r} holds 1 factor and boft_n_butterfly_factor is {config['factors']}: PEFT without its "
                "CUDA extension takes one; write 1 into adapter_config.json"
            )
    return dict(tensors)


_KEYS = {"r": "boft_R", "s": "boft_s"}
HF = hf.Format(peft_type="BOFT", keys={"linear": _KEYS, "head": _KEYS}, read=_read, write=_write, opened=_opened)
