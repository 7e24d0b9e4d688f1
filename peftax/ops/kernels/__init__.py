"""Which kernel makes the product of a packed weight: chosen by platform and shape, or by the weight itself."""

from __future__ import annotations

import functools
import importlib
import json
import warnings
from pathlib import Path

import jax

from peftax.ops.kernels import xla
from peftax.ops.qtensor import QTensor

PLATFORM = {"xla": None, "tpu": "tpu", "triton": "cuda", "mosaic_gpu": "cuda"}  # a file of this folder -> where it runs
DEFAULT = {"tpu": "tpu", "cuda": "xla"}  # on GPU until a timing on that device says otherwise
CHOICE = json.loads((Path(__file__).parent / "tiles" / "choice.json").read_text())  # device kind -> timed there


def product(x: jax.Array, w: QTensor, transposed: bool) -> jax.Array:
    """x [..., K] @ dense(w) -> [..., N]; transposed, x [..., N] @ dense(w)ᵀ -> [..., K].

    `w.kernel` names a file of this folder; "auto" takes DEFAULT's. A kernel that does not take this product gives way
    to XLA, with one warning on the machine that it concerns.
    """
    *lead, wide = x.shape
    x = x.reshape(-1, wide)
    wanted = _default() if w.kernel == "auto" else {PLATFORM[w.kernel]: w.kernel}
    branches = {}
    for platform, name in wanted.items():
        if platform is None or name == "xla":
            continue
        kernel = importlib.import_module(f"{__name__}.{name}")
        why_not = kernel.supports(w, x.shape[0], x.dtype, transposed=transposed)
        if why_not is None:
            branches[platform] = functools.partial(kernel.product, transposed=transposed)
        elif _platform() == platform:
            _warn(name, why_not)
    plain = functools.partial(xla.product, transposed=transposed)
    y = jax.lax.platform_dependent(x, w, default=plain, **branches) if branches else plain(x, w)
    return y.reshape(*lead, w.shape[-2 if transposed else -1])  # also of no rows


def _default() -> dict[str, str]:
    timed = CHOICE.get(jax.devices()[0].device_kind)  # experiments/device writes it
    return DEFAULT if timed is None else DEFAULT | {PLATFORM[timed["kernel"]] or _platform(): timed["kernel"]}


def _platform() -> str:
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


@functools.cache
def _warn(name: str, why_not: str) -> None:
    warnings.warn(f"{name} kernel: {why_not}; XLA makes this product", stacklevel=2)
