"""FourierFT: a few trained entries of the update's spectrum, at places that a seed draws (Gao et al., 2024).

  y  = x W + x D          D = alpha Re ifft2(S),  S = c at the places `at`, else 0
  W' = W + D              D[i, o] = alpha / (in out) sum over k of c_k cos(2 pi (u_k o / out + v_k i / in))

  c     : [frequencies]     trainable f32, N(0, 1); zeros with init="zeros"
  at    : [frequencies, 2]  frozen int32, pairs (u, v), 0 <= u < out, 0 <= v < in; the same in sites of one shape
  scale : [frequencies]     frozen f32, alpha; 0 where a layer of a stack has fewer frequencies than others

Not the identity at init, but with init="zeros". Trainable per site: frequencies.
Learning rate: 1e-2 to 1e-1 (the authors' run on CoLA: 1.2e-1; PEFT's MetaMathQA runs: 1e-4, which learn next
to nothing).
Source: https://arxiv.org/abs/2405.03003, eq. 2 to 4.
Departs: D is not made where tokens times frequencies are fewer than the kernel's numbers. x is transformed along its
inputs, taken at the v, and put at the u of outputs that are transformed back: of x's own size, where the paper and
Hugging Face PEFT make ifft2 of the kernel's size in every step.
`at` holds the numbers that PEFT draws from the same seed; neither's files hold them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import draws, hf, lift
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Patterns, Targets, by_pattern
from peftax.ops.product import last, linear

AXES = {"c": ("frequencies",), "at": ("frequencies", "pair"), "scale": ("frequencies",)}


def fourierft(
    *,
    frequencies: int = 1000,  # n, entries of the spectrum a site; PEFT's n_frequency
    alpha: float = 150.0,  # the scale; PEFT's scaling, which advises 100 to 300
    seed: int = 777,  # of the places; PEFT's random_loc_seed
    init: str = "gaussian",  # where c starts: "gaussian" | "zeros"
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    frequency_pattern: Patterns = None,  # {regex on the end of the name: frequencies there}, or pairs
    bias: str = "none",  # "none" | "all" | "fourierft_only": which of the base's biases train
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Trained entries of every target's spectrum."""
    config = dict(locals())
    for n in (frequencies, *dict(frequency_pattern or {}).values()):
        if n < 1:
            raise ValueError(f"fourierft: frequencies {n} must be at least 1")
    if init not in ("gaussian", "zeros"):
        raise ValueError(f"fourierft: init {init!r} is none of 'gaussian', 'zeros'")
    whole = modules_to_save or ()
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=whole, kinds=("linear", "head"))

    def settings(name: str, kind: str) -> dict[str, Any]:
        return {"frequencies": by_pattern(frequency_pattern, name, frequencies)}

    def start(key, k: Kernel, *, frequencies: int):
        c = jax.random.normal(key, (frequencies,)) if init == "gaussian" else jnp.zeros((frequencies,))
        frozen = {"at": jnp.asarray(places(seed, *k.w.shape, frequencies)), "scale": jnp.full((frequencies,), alpha)}
        return {"trainable": {"c": c}, "frozen": frozen}

    def call(theta, x, k: Kernel, ctx: Ctx):
        y = linear(x, k.w, k.b)
        more = product(x.astype(jnp.float32), theta["c"] * theta["scale"], theta["at"], y.shape[-1])
        return (y + more).astype(y.dtype)

    def fold(theta, k: Kernel) -> Kernel:
        return k.replace(w=k.w + update(theta["c"] * theta["scale"], theta["at"], *k.w.shape))

    adapted = lift.per_kernel(
        "fourierft",
        init=start,
        call=call,
        fold=fold,
        axes=AXES,
        settings=settings,
        targets=target,
        adapter=adapter,
        exact=("c", "scale"),  # transforms are float32's
    )
    return lift.with_base(adapted, target, bias=bias, config=config)


@functools.lru_cache(32)
def places(seed: int, n_in: int, n_out: int, frequencies: int) -> np.ndarray:
    """[frequencies, 2]: what torch's randperm(out in) under this seed begins with, as (row, column) of [out, in]."""
    if frequencies > n_in * n_out:
        raise ValueError(
            f"fourierft: frequencies {frequencies} are more than the {n_in * n_out} entries of a kernel [{n_in}, "
            f"{n_out}]; leave it out of targets or give it fewer by frequency_pattern"
        )
    first = draws.Generator(seed).permutation(n_in * n_out, frequencies)
    return np.stack([first // n_in, first % n_in], axis=-1).astype(np.int32)


def update(c: jax.Array, at: jax.Array, n_in: int, n_out: int) -> jax.Array:
    """D = Re ifft2(S), [in, out], for a spectrum S that is c_k at (u_k, v_k) and else 0."""
    u, v = at.T
    return jnp.fft.ifft2(jnp.zeros((n_in, n_out)).at[v, u].add(c)).real


def product(x: jax.Array, c: jax.Array, at: jax.Array, n_out: int) -> jax.Array:
    """x D, D as in `update`, by transforms of x's and y's length.

      y[o] = 1 / (in out) Re sum_k c_k e(u_k o / out) sum_i x[i] e(v_k i / in),  e(t) = exp(2 pi i t)

    It moves a number for each token and frequency. Where those are more than D's numbers, D is made (run on a CPU: with
    256 tokens, [576, 1536] and 500, 4,800, 24,000 frequencies 4, 77, 520 ms this way, 30 to 60 that way, with slopes).

    Args:
      x: [..., in] float32.
      c: [n] float32.
      at: [n, 2] integer, u in [0, out) and v in [0, in).

    Returns:
      [..., out] float32.
    """
    n_in, (u, v) = x.shape[-1], at.T
    if math.prod(x.shape[:-1]) * len(c) > n_in * n_out:
        again = jax.checkpoint(lambda x, c: x @ update(c, at, n_in, n_out))  # or D would be kept for the backward pass
        return again(x, c)
    # of real numbers the transform at n - v is the conjugate of that at v: half of them is enough, on both sides
    low = jnp.fft.rfft(x)[..., jnp.minimum(v, n_in - v)]
    low = low * last(c / n_in, low)
    up = jnp.where(last((2 * v <= n_in) == (2 * u <= n_out), low), low.conj(), low)
    half = jnp.zeros((*x.shape[:-1], n_out // 2 + 1), up.dtype).at[..., jnp.minimum(u, n_out - u)].add(up)
    alone = last(jnp.arange(n_out // 2 + 1) * 2 % n_out == 0, half)  # those that are their own other half
    return jnp.fft.irfft(jnp.where(alone, half.real, half / 2), n_out)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    bias = config.get("bias", "none")
    return {
        **hf.read_targets(config),
        "frequencies": config.get("n_frequency", 1000),
        "alpha": config.get("scaling", 150.0),
        "seed": config.get("random_loc_seed", 777),
        "init": "zeros" if config.get("init_weights", False) else "gaussian",
        "frequency_pattern": config.get("n_frequency_pattern") or {},
        "bias": "fourierft_only" if bias == "fourier_only" else bias,
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **hf.write_targets(config),
        "n_frequency": config["frequencies"],
        "scaling": config["alpha"],
        "random_loc_seed": config["seed"],
        "init_weights": config["init"] == "zeros",
        "n_frequency_pattern": dict(config["frequency_pattern"] or {}),
        "bias": "fourier_only" if config["bias"] == "fourierft_only" else config["bias"],
    }


_KEYS = {"c": "fourierft_spectrum"}

HF = hf.Format(peft_type="FOURIERFT", keys={"linear": _KEYS, "head": _KEYS}, read=_read, write=_write)
