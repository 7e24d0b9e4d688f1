"""SHiRA: a few trained entries of the kernel itself, at places that a seed draws (Bhardwaj et al., 2024).

  y  = x (W + D)          D = v at the places `at`, else 0
  W' = W + D

  v  : [entries]     trainable f32, zeros; entries = rank (in + out)
  at : [entries, 2]  frozen int32, the pairs (output, input), in order; the same in sites of one shape

Identity at init. Trainable per site: rank (in + out).
Learning rate: 1e-4 to 1e-3 (PEFT's MetaMathQA run: 3e-4).
Source: https://arxiv.org/abs/2406.13175, its section on sparse high-rank adapters; the mask is the paper's SHiRA-Rand,
of which a file may hold any other.
Departs: where rows of x times entries are less than the numbers of the kernel (generation), inputs are gathered and
outputs summed, and nothing of the kernel's size is made. Else W + D is made as in Hugging Face PEFT, in the kernel's
dtype, for one product instead of two; PEFT keeps it for the backward pass, here it is made again. A packed kernel stays
packed, and x D is a product of its own, also as in PEFT. The seed None is torch's own first one, always the same.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import draws, hf, lift
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Targets
from peftax.ops.product import last, linear, matmul
from peftax.ops.qtensor import QTensor

AXES = {"v": ("entries",), "at": ("entries", "pair")}
UNSEEDED = 67280421310721  # the seed of a torch.Generator() that was given none


def shira(
    *,
    rank: int = 32,  # r: as many entries train as LoRA's factors of this rank would hold
    seed: int | None = None,  # of the places; PEFT's random_seed
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Sparse high-rank adaptation of every target."""
    config = dict(locals())
    if rank < 1:
        raise ValueError(f"shira: rank {rank} must be at least 1")
    whole = modules_to_save or ()
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=whole, kinds=("linear", "head"))

    def init(key, k: Kernel):
        at = places(UNSEEDED if seed is None else seed, *k.w.shape, rank)
        return {"trainable": {"v": jnp.zeros((len(at),))}, "frozen": {"at": jnp.asarray(at)}}

    def call(theta, x, k: Kernel, ctx: Ctx):
        (n_in, n_out), v, at = k.w.shape, theta["v"], theta["at"]
        if x.size // n_in * v.size < n_in * n_out:
            return linear(x, k.w, k.b) + gathered(x, v, at, n_out)
        if isinstance(k.w, QTensor):
            return linear(x, k.w, k.b) + changed(x, jnp.zeros((n_in, n_out), x.dtype), v, at)
        y = changed(x, k.w, v, at)
        return y if k.b is None else y + last(k.b, y)

    def fold(theta, k: Kernel) -> Kernel:
        return k.replace(w=put(k.w, theta["v"], theta["at"]))

    adapted = lift.per_kernel(
        "shira",
        init=init,
        call=call,
        fold=fold,
        axes=AXES,
        settings=lambda name, kind: {},
        targets=target,
        adapter=adapter,
    )
    return lift.with_base(adapted, target, config=config)


@functools.lru_cache(32)
def places(seed: int, n_in: int, n_out: int, rank: int) -> np.ndarray:
    """[rank (in + out), 2]: what torch's randperm(out in) under this seed begins with, as rows and columns, sorted."""
    entries = rank * (n_in + n_out)
    if entries > n_in * n_out:
        raise ValueError(
            f"shira: rank {rank} would train {entries} entries of a kernel [{n_in}, {n_out}], which has "
            f"{n_in * n_out}; at most rank {n_in * n_out // (n_in + n_out)} fits there"
        )
    chosen = np.sort(draws.Generator(seed).permutation(n_in * n_out, entries))
    return np.stack([chosen // n_in, chosen % n_in], axis=-1).astype(np.int32)


def put(w: jax.Array, v: jax.Array, at: jax.Array) -> jax.Array:
    """w [in, out] with v [n] added at the (output, input) of `at` [n, 2]."""
    return w.at[at[:, 1], at[:, 0]].add(v)


@jax.checkpoint  # or an array of the kernel's size would be kept for the backward pass
def changed(x: jax.Array, w: jax.Array, v: jax.Array, at: jax.Array) -> jax.Array:
    """x @ put(w, v, at): [..., out]."""
    return matmul(x, put(w, v, at))


def gathered(x: jax.Array, v: jax.Array, at: jax.Array, n_out: int) -> jax.Array:
    """x [..., in] times the sparse matrix of v [n] at `at` [n, 2], through [..., n], summed in f32: [..., out]."""
    parts = x[..., at[:, 1]].astype(jnp.float32)
    parts = parts * last(v.astype(jnp.float32), parts)
    return jnp.zeros((*x.shape[:-1], n_out)).at[..., at[:, 0]].add(parts).astype(x.dtype)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **hf.read_targets(config),
        "rank": config.get("r", 32),
        "seed": config.get("random_seed"),
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **hf.write_targets(config, known=()),
        "r": config["rank"],
        "mask_type": "random",
        "random_seed": config["seed"],
        "init_weights": True,
    }


def _check(leaf: str, value: np.ndarray, shape: tuple[int, int]) -> None:
    if leaf != "at":
        return
    n_in, n_out = shape
    outside = ((value < 0) | (value >= (n_out, n_in))).any(axis=1)
    if outside.any():
        raise ValueError(
            f"the place (output, input) {tuple(value[outside][0].tolist())} is none of a kernel of {n_out} outputs and "
            f"{n_in} inputs; does the adapter belong to another model?"
        )
    places, times = np.unique(value, axis=0, return_counts=True)
    if (times > 1).any():
        raise ValueError(f"the place (output, input) {tuple(places[times > 1][0].tolist())} stands twice")


_KEYS = {"v": "shira_weight", "at": "shira_indices"}

HF = hf.Format(peft_type="SHIRA", keys={"linear": _KEYS, "head": _KEYS}, read=_read, write=_write, check=_check)
