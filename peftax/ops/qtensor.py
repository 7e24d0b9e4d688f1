"""QTensor: a frozen weight in few bits, and what its bits mean.

  w[k, n] = levels[code[k, n]] * scale[k // group, n]  (+ low[k // group, n])

A format is its levels: sixteen of them for four bits, the integer itself for eight. Nothing else tells formats apart.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = tuple(float(np.float32(x) / np.float32(12)) for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))

LEVELS: dict[str, tuple[float, ...] | None] = {
    "nf4": NF4,  # quantiles of a normal distribution; QLoRA, appendix E, as bitsandbytes holds them
    "fp4": (*_FP4, 0.0, *(-x for x in _FP4[1:])),  # bitsandbytes' own: one sign, two exponent bits, one of mantissa
    "int4": (*map(float, range(8)), *map(float, range(-8, 0))),  # two's complement
    "q4_0": tuple(float(i - 8) for i in range(16)),  # GGUF
    "q4_1": tuple(float(i) for i in range(16)),  # GGUF; has `low`
    "int8": None,
    "q8_0": None,  # GGUF
}
GROUPS = {  # that `quantize` makes; None: one group a column
    "nf4": (32, 64, 128, 256, 512, 1024, 2048, 4096),
    "fp4": (32, 64, 128, 256, 512, 1024, 2048, 4096),
    "int4": (32, 64, 128),
    "q4_0": (32,),
    "q4_1": (32,),
    "q8_0": (32,),
    "int8": (None,),
}
NESTED = 256  # scales that share one second scale under double quantization


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
    """A weight [..., K, N], packed along K; a pytree whose arrays scan slices and a mesh splits.

    The shape follows from the arrays: a static one would be stale inside a scan.

    packed: uint8 [..., K/2, N], code of row 2i in the low half of byte i; int8 [..., K, N] for eight bits.
    scale:  [..., K/group, 1, N] floating; with double quantization uint8, the second code.
    low:    as scale, what is added; None but for "q4_1".
    nested: f32 [..., ceil(K N / group / 256)], the second scales; None without double quantization.
            Blocks number the first scales column after column, as bitsandbytes lays torch's [N, K].
    offset: f32 [...], the mean of the first scales; None without double quantization.
    fmt:    a key of LEVELS.
    dtype:  what it is as numbers: the dtype of `dense`.
    kernel: what makes its products: a file of peftax/ops/kernels, or "auto", by platform and shape.
    rows:   how a batch's rows and tokens lie on a mesh (NamedSharding); `inject` says so, a stored weight does not.
    split:  the mesh axes that K and N are split over; as `rows`.
    """

    packed: Any
    scale: Any
    low: Any = None
    nested: Any = None
    offset: Any = None
    fmt: str = dataclasses.field(default="nf4", metadata={"static": True})
    dtype: Any = dataclasses.field(default=jnp.dtype("float32"), metadata={"static": True})
    kernel: str = dataclasses.field(default="auto", metadata={"static": True})
    rows: Any = dataclasses.field(default=None, metadata={"static": True})
    split: Any = dataclasses.field(default=(None, None), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, k, n = self.packed.shape
        return (*lead, k * self.per_byte, n)

    @property
    def per_byte(self) -> int:
        return 1 if LEVELS[self.fmt] is None else 2

    @property
    def ndim(self) -> int:
        return self.packed.ndim

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def group(self) -> int:
        """Rows of K that share a scale."""
        return self.shape[-2] // self.scale.shape[-3]

    @property
    def double(self) -> bool:
        return self.nested is not None

    def astype(self, dtype: Any) -> QTensor:
        """The same bits, that shall be numbers of another dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def with_lead(self, *lead: int) -> QTensor:
        """The same weights with other axes in front of [K, N]."""
        n = self.ndim - 2
        return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[n:]), self)


def check(w: QTensor) -> None:
    """Raise ValueError unless the arrays of a packed weight are of one weight in a known format."""

    def fail(what: str) -> None:
        raise ValueError(f"QTensor {w.fmt!r}: {what}")

    if w.fmt not in LEVELS:
        fail(f"no such format; there are {', '.join(LEVELS)}")
    if w.packed.dtype != (kind := "int8" if LEVELS[w.fmt] is None else "uint8"):
        fail(f"packed is {w.packed.dtype}, not {kind}")
    (*lead, k, n), blocks = w.shape, w.scale.shape[-3] if w.scale.ndim > 2 else 0
    if not blocks or w.scale.shape != (*lead, blocks, 1, n) or k % blocks:
        fail(f"scales {w.scale.shape} are not [..., K/group, 1, N] of a weight {w.shape}")
    if (w.low is not None) != (w.fmt == "q4_1") or (w.low is not None and w.low.shape != w.scale.shape):
        fail("q4_1, and no other format, has a low beside every scale")
    if w.double != (w.scale.dtype == np.uint8) or w.double != (w.offset is not None):
        fail("scales in uint8, nested scales and an offset come together")
    if w.double:
        want = (*lead, -(-blocks * n // NESTED)), tuple(lead)
        if (w.nested.shape, w.offset.shape) != want:
            got = f"{w.nested.shape}, offset {w.offset.shape}"
            fail(f"nested scales {got}; want {want[0]} and {want[1]}, one for {NESTED} scales")


def dense(w: Any) -> Any:
    """The numbers of a QTensor [..., K, N] in its dtype: computed in f32, rounded once; an array as it is.

    Raises ValueError where `check` does.
    """
    if not isinstance(w, QTensor):
        return w
    check(w)
    *lead, k, n = w.shape
    grouped = values(w).reshape(*lead, k // w.group, w.group, n) * scales(w)
    if w.low is not None:
        grouped = rounded(grouped) + w.low.astype(jnp.float32)
    return grouped.reshape(w.shape).astype(w.dtype)


def values(w: QTensor) -> jax.Array:
    """levels[code], f32 [..., K, N]."""
    levels = LEVELS[w.fmt]
    if levels is None:
        return w.packed.astype(jnp.float32)
    return look_up(codes(w.packed), levels)


def codes(packed: jax.Array) -> jax.Array:
    """uint8 [..., K/2, N] -> [..., K, N] in 0..15."""
    *lead, half, n = packed.shape
    return jnp.stack([packed & 15, packed >> 4], axis=-2).reshape(*lead, 2 * half, n)


def look_up(code: jax.Array, levels: tuple[float, ...]) -> jax.Array:
    """levels[code], as a tree of selects on the code's bits: a gather is done number by number on a CPU."""
    row = [jnp.float32(x) for x in levels]
    for bit in range(4):
        on = (code >> bit) & 1 == 1
        row = [jnp.where(on, high, low) for low, high in zip(row[::2], row[1::2], strict=True)]
    return row[0]


def scales(w: QTensor, *, at: Sequence[Any] = (0, 0), blocks: int | None = None) -> jax.Array:
    """f32 [..., K/group, 1, N]; double quantization undone.

    Of a part of a weight: `at` says where its first group and column lie in the whole, with `blocks` groups a column.
    """
    if not w.double:
        return w.scale.astype(jnp.float32)
    *lead, own, _, n = w.scale.shape
    number = (at[1] + jnp.arange(n))[None] * (blocks or own) + at[0] + jnp.arange(own)[:, None]  # [K/group, N]
    second = jnp.take(w.nested, number // NESTED, axis=-1, mode="clip")
    code = w.scale.reshape(*lead, own, n).astype(jnp.int32)  # on TPU an axis of one costs eight rows
    first = jnp.take(jnp.asarray(dynamic_levels()), code, axis=0, mode="clip")
    scale = rounded(first * second) + w.offset.reshape(*lead, 1, 1)
    return scale.reshape(w.scale.shape)


def rounded(x: jax.Array) -> jax.Array:
    """x as f32 holds it: XLA for CPU would else round a product only together with the sum that it goes into."""
    return jnp.where(jnp.isnan(x), jnp.nan, x)  # a compiler sees through a barrier, not through a choice


@functools.cache
def dynamic_levels() -> np.ndarray:
    """The 256 levels of bitsandbytes' signed 8-bit "dynamic" map, f32 [256], rising.

      ± 10^(i-6) m,  m the middles of 2^i equal parts of [0.1, 1],  i = 0 .. 6;  0;  1

    Source: Dettmers, arXiv 1511.04561, in the bits that torch.linspace gives where the processor has fused
    multiply-adds; without them 42 levels differ by one unit in the last place.
    """
    low, high = np.float32(0.1), np.float32(1)
    levels = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for i in range(7):
        at = np.arange(2**i + 1)
        step = np.float64((high - low) / np.float32(2**i))
        near_low = at < len(at) // 2  # linspace counts from the nearer end
        edges = np.where(near_low, low + step * at, high - step * (2**i - at)).astype(np.float32)
        part = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        levels += [part, -part]
    found = np.sort(np.concatenate(levels))
    found.setflags(write=False)
    return found
