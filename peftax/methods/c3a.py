"""C3A: the update is made of circulant blocks, each of one trained vector (Chen et al., 2024).

  y  = x W + x D          D's block of inputs q and outputs p:  D[j, i] = w[p, q, (j - i) mod block] / in
  W' = W + D

  w : [out_blocks, in_blocks, block]  trainable f32, U(±sqrt(6 / (in + out))) or as `init` says

Not the identity at init, but with init="zeros". Trainable per site: in out / block.
Learning rate: 1e-1 to 1 (PEFT's MetaMathQA run: 3e-1; D is divided by `in`).
Source: https://arxiv.org/abs/2407.19342, its section on block-circular convolution.
Departs: as Hugging Face PEFT, but for the gradient by x: PEFT 0.21.2 writes it by hand, with w turned about, which is
not that of its product. Its four transforms of complex numbers are three of real ones here.
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
from peftax.ops.product import linear

AXES = {"w": ("out_blocks", "in_blocks", "block")}
INITS = ("xavier_uniform", "kaiming_uniform", "gaussian", "zeros")


def c3a(
    *,
    block: int = 256,  # length of a vector; divides inputs and outputs of every target, the larger the fewer train
    init: str = "xavier_uniform",  # where w starts: "xavier_uniform" | "kaiming_uniform" | "gaussian" | "zeros"
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    block_pattern: Patterns = None,  # {regex on the end of the name: block there}, or pairs
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Block-circulant updates of every target."""
    config = dict(locals())
    for b in (block, *dict(block_pattern or {}).values()):
        if b < 1:
            raise ValueError(f"c3a: block {b} must be at least 1")
    if init not in INITS:
        raise ValueError(f"c3a: init {init!r} is none of {', '.join(map(repr, INITS))}")
    whole = modules_to_save or ()
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=whole, kinds=("linear", "head"))

    def settings(name: str, kind: str) -> dict[str, Any]:
        return {"block": by_pattern(block_pattern, name, block)}

    def start(key, k: Kernel, *, block: int):
        n_in, n_out = k.w.shape
        if n_in % block or n_out % block:
            raise ValueError(
                f"c3a: block {block} must divide inputs and outputs of every target; the largest that divides "
                f"{n_in}, {n_out} is {math.gcd(n_in, n_out)} (block_pattern gives a target its own)"
            )
        shape = (n_out // block, n_in // block, block)
        if init == "gaussian":
            return {"trainable": {"w": jax.random.normal(key, shape)}}
        bound = {"xavier_uniform": math.sqrt(6 / (n_in + n_out)), "kaiming_uniform": math.sqrt(1 / n_in), "zeros": 0.0}
        return {"trainable": {"w": jax.random.uniform(key, shape, minval=-bound[init], maxval=bound[init])}}

    def call(theta, x, k: Kernel, ctx: Ctx):
        y = linear(x, k.w, k.b)
        return y + (product(x.astype(jnp.float32), theta["w"]) / x.shape[-1]).astype(y.dtype)

    def fold(theta, k: Kernel) -> Kernel:
        turned = np.arange(theta["w"].shape[-1])
        update = theta["w"][:, :, (turned[:, None] - turned) % len(turned)]  # [out_blocks, in_blocks, j, i]
        return k.replace(w=k.w + update.transpose(1, 2, 0, 3).reshape(k.w.shape) / k.w.shape[0])

    adapted = lift.per_kernel(
        "c3a",
        init=start,
        call=call,
        fold=fold,
        axes=AXES,
        settings=settings,
        targets=target,
        adapter=adapter,
        exact=("w",),  # transforms are float32's
        alike=True,
    )
    return lift.with_base(adapted, target, config=config)


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x against the circulant blocks that w stands for: sums of circular correlations, by their transforms.

      y[p, i] = sum over q, j of x[q, j] w[p, q, (j - i) mod b];  F y_p = sum_q F x_q conj(F w_pq)

    Args:
      x: [..., in] float32.
      w: [out / b, in / b, b] float32.

    Returns:
      [..., out] float32.
    """
    _, blocks, b = w.shape
    fx, fw = jnp.fft.rfft(x.reshape(*x.shape[:-1], blocks, b)), jnp.fft.rfft(w).conj()
    fy = jnp.einsum("...qf,pqf->...pf", fx, fw)
    return jnp.fft.irfft(fy, b).reshape(*x.shape[:-1], -1)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    start = config.get("init_weights", "xavier_uniform")
    return {
        **hf.read_targets(config),
        "block": config.get("block_size", 256),
        "init": {True: "zeros", False: "xavier_uniform", None: "xavier_uniform"}.get(start, start),
        "block_pattern": config.get("block_size_pattern") or {},
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = hf.write_targets(config, known=("layers",))
    del fields["fan_in_fan_out"]
    return {
        **fields,
        "block_size": config["block"],
        "init_weights": True if config["init"] == "zeros" else config["init"],
        "block_size_pattern": dict(config["block_pattern"] or {}),
    }


_KEYS = {"w": "c3a_kernel"}

HF = hf.Format(peft_type="C3A", keys={"linear": _KEYS, "head": _KEYS}, read=_read, write=_write)
