"""The formats on trial: what a weight becomes in each, what that costs in bits, and how far off it is.

  error = w - dense(quantize(w))

Ours go through peftax.ops.quantize. The others are their levels: the nearest to w / max |w| of the block.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from peftax.ops.qtensor import GROUPS, NESTED, QTensor, dense
from peftax.ops.quantize import quantize

OURS = {  # title -> format of peftax, double quantization
    "NF4": ("nf4", False),
    "NF4 double": ("nf4", True),
    "FP4": ("fp4", False),
    "Int4": ("int4", False),
    "Q4_0": ("q4_0", False),
    "Q4_1": ("q4_1", False),
    "Int8": ("int8", False),
    "Q8_0": ("q8_0", False),
}


_dense = jax.jit(dense)


def _signed(*levels: float) -> np.ndarray:
    """Both signs of levels from 0 up, as parts of the largest."""
    part = np.array(levels) / max(levels)
    return np.unique(np.concatenate([-part, part])).astype(np.float32)


LEVELS = {
    "E2M1": _signed(0, 0.5, 1, 1.5, 2, 3, 4, 6),
    "E3M0": _signed(0, *(2.0**i for i in range(-2, 5))),
    "Int4": _signed(*range(8)),  # for blocks that our int4 does not have
}


def is_ours(title: str, group: int | None) -> bool:
    """Whether peftax's quantizer makes it; else its levels do."""
    return title in OURS and group in GROUPS[OURS[title][0]]


def there_and_back(w_KxN: np.ndarray, title: str, group: int | None) -> tuple[np.ndarray, float]:
    """What a weight is after quantization, f32 [K, N], and its bits per weight; group None: one a column."""
    if is_ours(title, group):
        fmt, double = OURS[title]
        packed = quantize(jnp.asarray(w_KxN), fmt, group=group, double=double)
        return np.asarray(_dense(packed)), bits(packed)
    return by_levels(w_KxN, LEVELS[title], group or len(w_KxN)), 4 + 32 / (group or len(w_KxN))


def by_levels(w_KxN: np.ndarray, levels: np.ndarray, group: int) -> np.ndarray:
    """levels[nearest to w / absmax] absmax, absmax = max |w| over `group` rows of a column; f32 [K, N]."""
    grouped = w_KxN.reshape(-1, group, w_KxN.shape[1])
    absmax = np.abs(grouped).max(axis=1, keepdims=True)
    part = grouped / np.where(absmax == 0, np.float32(1), absmax)
    nearest = np.zeros(part.shape, np.uint8)
    for middle in (levels[1:] + levels[:-1]) / 2:  # faster than a search for sixteen
        nearest += part > middle
    return (levels[nearest] * absmax).reshape(w_KxN.shape)


def evenly_doubled(w_KxN: np.ndarray, group: int) -> np.ndarray:
    """NF4 whose absmax are in 8 bits of equal steps: less their mean, blocks of 256; not what bitsandbytes does."""
    plain = quantize(jnp.asarray(w_KxN), "nf4", group=group)
    absmax = np.asarray(plain.scale)
    blocks = (absmax - absmax.mean())[:, 0].T.reshape(-1, NESTED)
    step = np.abs(blocks).max(axis=1, keepdims=True) / 127
    second = (np.round(blocks / step) * step).reshape(absmax.shape[2], -1).T[:, None] + absmax.mean()
    return np.asarray(dense(dataclasses.replace(plain, scale=jnp.asarray(second))))


def bits(w: QTensor, *, offset: bool = True) -> float:
    """Bits per weight, counted from the arrays; `offset` is the one number a matrix of double quantization."""
    arrays = (w.packed, w.scale, w.low, w.nested, w.offset if offset else None)
    return 8 * sum(x.nbytes for x in arrays if x is not None) / w.size


@dataclasses.dataclass(frozen=True)
class Errors:
    """Sums over weights; those of several matrices add up."""

    count: int = 0
    bits: float = 0.0  # of all weights together
    size: float = 0.0  # sum |error|
    square: float = 0.0
    relative: float = 0.0  # sum |error| / (|w| + 1e-8), as bitsandbytes' tests have it
    power: float = 0.0  # sum w^2

    def __add__(self, other: Errors) -> Errors:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Errors(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def means(self) -> dict[str, float]:
        """Per weight; `norm_ratio` is the RMS of the errors over that of the weights."""
        n = self.count
        found = {"bits": self.bits, "mae": self.size, "mse": self.square, "relative": self.relative}
        return {k: v / n for k, v in found.items()} | {"norm_ratio": (self.square / self.power) ** 0.5}


def measure(w_KxN: np.ndarray, title: str, group: int | None) -> Errors:
    back, per_weight = there_and_back(w_KxN, title, group)
    return between(w_KxN, back, per_weight)


def between(w: np.ndarray, back: np.ndarray, per_weight: float = 0.0) -> Errors:
    """The errors of `back`; its differences from w are those of f32, as bitsandbytes' tests take them."""
    size, whole = np.abs(w - back), np.abs(w)
    return Errors(
        count=w.size,
        bits=per_weight * w.size,
        size=float(size.sum(dtype=np.float64)),
        square=float(np.square(size, dtype=np.float64).sum()),
        relative=float((size / (whole + np.float32(1e-8))).sum(dtype=np.float64)),
        power=float(np.square(whole, dtype=np.float64).sum()),
    )


def standard_errors(w_KxN: np.ndarray, back: np.ndarray, group: int) -> tuple[float, float]:
    """Of mean |error| and of mean error^2, from sample to sample; blocks are independent, numbers in one are not."""
    error = np.abs(w_KxN - back).reshape(-1, group, w_KxN.shape[1])
    blocks = error.mean(axis=1), np.square(error).mean(axis=1)
    return tuple(float(x.std() / x.size**0.5) for x in blocks)  # type: ignore[return-value]
