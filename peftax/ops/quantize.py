"""From numbers to a QTensor: the codes and scales that bitsandbytes and GGUF's reference would write, byte for byte.

XLA for CPU takes numbers below 2^-126 for zero, multiplies by 1 / c where a program divides by a constant c, takes
b / a for 1 / (a / b), and rounds a product only together with the sum it goes into. Each would change bytes.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax.ops.qtensor import GROUPS, LEVELS, NESTED, QTensor, dynamic_levels, look_up, rounded

GROUP = 64  # where none is asked for and the format leaves the choice
SMALLEST = np.float32(1e-38)  # bitsandbytes divides by no absmax below it
POSITIVE = 0x7FFFFFFF  # all bits of an f32 but the sign
CHUNK = 1 << 20  # numbers quantized at once: beside w no other array of its size is held
LIFT = 64  # a block below 2^-LIFT is multiplied by 2^LIFT before it is divided: nothing is flushed to zero

Encode = Callable[[jax.Array], jax.Array]


def quantize(
    w: jax.Array, fmt: str, *, group: int | None = None, double: bool = False, by_row: bool = False
) -> QTensor:
    """w in few bits: every `group` rows of a column share a scale.

      nf4, fp4          scale = max |w|           code = the nearest level to w / scale
      int4, int8        scale = max |w| / top     code = round(w / scale),  top = 7, 127
      q4_0, q4_1, q8_0  as GGUF's reference rounds

    On CPU nf4 and fp4 equal in every byte, absmax, nested scales and offset included, what bitsandbytes makes of w.T on
    one thread. A group with a number that is not finite is not finite afterwards either.

    Args:
      w: [..., K, N] f32, bf16 or f16; every matrix of the leading axes is quantized by itself.
      fmt: a key of LEVELS.
      group: K must be a multiple of it; None: 64, or the only one the format has.
      double: quantize the scales too, to 8 bits in blocks of 256. For nf4 and fp4.
      by_row: every row has a scale, none a column: of a table, whose rows are what is looked up. For int8.

    Returns:
      A QTensor of w's shape and dtype.

    Raises:
      ValueError: an unknown format, a group it does not have or that does not divide K, a w that is no float matrix
        or holds no numbers, double quantization of another format.

    Source: Dettmers et al., "QLoRA", NeurIPS 2023; bitsandbytes 0.50.2; ggml's quantize_row_*_ref.
    """
    if fmt not in LEVELS:
        raise ValueError(f"quantize: no format {fmt!r}; {_nearest(fmt)}the formats are {', '.join(LEVELS)}")
    if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"quantize: wants floating [..., K, N], got {w.dtype} {w.shape}")
    if 0 in w.shape:
        raise ValueError(f"quantize: w {w.shape} holds no numbers; leave it out")
    if double and fmt not in ("nf4", "fp4"):
        raise ValueError(f"quantize: double quantization is for nf4 and fp4, not {fmt}; drop double")
    if by_row and (fmt != "int8" or group is not None):
        raise ValueError(f"quantize: a table's rows have their scales in int8 without groups, not in {fmt}")
    sizes = GROUPS[fmt]
    if group is None:
        group = GROUP if GROUP in sizes else sizes[0]
    elif group not in sizes:
        had = ", ".join("one a column (group=None)" if g is None else str(g) for g in sizes)
        raise ValueError(f"quantize: {fmt} has no group {group}; it has {had}")
    rows = w.shape[-2]
    if group is not None and rows % group:
        fits = [g for g in sizes if g is not None and rows % g == 0]
        advice = f"take group {fits[-1]}" if fits else "leave this weight as it is, or take int8"
        raise ValueError(f"quantize: K = {rows} is not a multiple of the group {group}; {advice}")
    if by_row:
        made = _quantize(w[..., None], fmt, None, False)  # each row a matrix of one column
        return dataclasses.replace(made, packed=made.packed[..., 0], scale=made.scale[..., 0])
    return _quantize(w, fmt, group, double)


def _nearest(fmt: str) -> str:
    near = difflib.get_close_matches(fmt, LEVELS, 1)
    return f"nearest: {near[0]}; " if near else ""


@functools.partial(jax.jit, static_argnames=("fmt", "group", "double"))
def _quantize(w: jax.Array, fmt: str, group: int | None, double: bool) -> QTensor:
    *lead, rows, n = w.shape
    group = group or rows
    dtype = w.dtype
    if dtype == jnp.bfloat16:  # by its bits: bf16 itself XLA for CPU would turn into f32 as a whole, before the loop
        w = jax.lax.bitcast_convert_type(w, jnp.uint16)
    groups = w.reshape(-1, group, n)  # of all matrices
    most = max(1, CHUNK // (group * n))
    at_once = max(d for d in range(1, min(most, len(groups)) + 1) if len(groups) % d == 0)
    made = jax.lax.map(functools.partial(_of_groups, fmt=fmt), groups.reshape(-1, at_once, group, n))
    packed, scale, *low = (x.reshape(*lead, -1, n) for x in made)
    scale, *low = (x[..., None, :] for x in (scale, *low))
    quantized = QTensor(packed, scale, *low, fmt=fmt, dtype=dtype)
    return _doubled(quantized) if double else quantized


def _of_groups(w: jax.Array, fmt: str) -> tuple[jax.Array, ...]:
    """packed, scale and perhaps low of w [G, group, N] floating, or uint16 for the bits of bf16."""
    bf16 = w.dtype == jnp.uint16
    x = jax.lax.bitcast_convert_type(w.astype(jnp.uint32) << 16, jnp.float32) if bf16 else w.astype(jnp.float32)
    encode, *statistics = MAKERS[fmt](x)
    if LEVELS[fmt] is None:
        return encode(x), *statistics
    # codes of even rows and of odd ones: of all, to pick from, would be one more array
    even, odd = (encode(x[:, first::2]).astype(jnp.uint8) for first in (0, 1))
    return even | odd << 4, *statistics


def quantize_flat(x: jax.Array, fmt: str, block: int) -> tuple[jax.Array, jax.Array]:
    """bitsandbytes' own form of nf4 and fp4: numbers in a row, blocks cut from it, the last perhaps short.

    Args:
      x: [...] f32, bf16 or f16, read row by row.
      fmt: "nf4" or "fp4".
      block: numbers that share an absmax.

    Returns:
      packed: uint8 [ceil(size / 2)], the first of two numbers in the high half; a missing last one is 0.
      absmax: f32 [ceil(size / block)].

    Raises:
      ValueError: another format or block.
    """
    _check_flat(fmt, block)
    return _quantize_flat(x, fmt, block)


@functools.partial(jax.jit, static_argnames=("fmt", "block"))
def _quantize_flat(x: jax.Array, fmt: str, block: int) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.float32).reshape(-1)
    full = x.size // block * block
    codes, scales = [], []
    for part, short in ((x[:full].reshape(-1, block, 1), False), (x[full:].reshape(1, -1, 1), True)):
        if part.size:
            encode, absmax = _by_levels(part, fmt=fmt, short=short)
            codes.append(encode(part).reshape(-1))
            scales.append(absmax.reshape(-1))
    if x.size % 2:
        codes.append(jnp.full(1, (LEVELS[fmt] or ()).index(0.0), jnp.uint8))
    code = jnp.concatenate(codes)
    return code[0::2] << 4 | code[1::2], jnp.concatenate(scales)


@functools.partial(jax.jit, static_argnames=("fmt", "block", "shape", "dtype"))
def dense_flat(
    packed: jax.Array, absmax: jax.Array, fmt: str, block: int, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> jax.Array:
    """The numbers of `quantize_flat`, [*shape]: levels[code] absmax in f32, rounded once to dtype."""
    _check_flat(fmt, block)
    size = math.prod(shape)
    code = jnp.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[:size]
    levels = look_up(code, LEVELS[fmt] or ())
    return (levels * jnp.repeat(absmax, block)[:size]).astype(dtype).reshape(shape)


def _check_flat(fmt: str, block: int) -> None:
    if fmt not in ("nf4", "fp4"):
        raise ValueError(f"quantize: the flat form is for nf4 and fp4, not {fmt!r}")
    if block not in GROUPS[fmt]:
        raise ValueError(f"quantize: {fmt} has no block {block}; it has {', '.join(map(str, GROUPS[fmt]))}")


def _by_levels(x: jax.Array, *, fmt: str, short: bool = False) -> tuple[Encode, jax.Array]:
    """The nearest level, of two as near the lower.

    `short`: as bitsandbytes treats a last block that is not full; it divides where it else multiplies by 1 / absmax.
    """
    # the bits of |x| order as |x| does, whatever XLA makes of small numbers
    absmax_bits = jnp.max(_bits(x) & POSITIVE, axis=-2, keepdims=True)
    if short:
        absmax_bits = jnp.maximum(absmax_bits, SMALLEST.view(np.int32))
    absmax = jax.lax.bitcast_convert_type(absmax_bits, jnp.float32)
    small = absmax_bits < np.float32(2.0**-LIFT).view(np.int32)
    floor = np.float32(np.float64(SMALLEST) * 2.0**LIFT)
    top = jnp.where(small, jnp.maximum(_lifted(absmax_bits), floor), absmax)
    inverse = 1 / top
    order, bounds = _bounds(fmt)

    def encode(x: jax.Array) -> jax.Array:
        bits = _bits(x)
        lifted = _lifted(bits & POSITIVE)
        y = jnp.where(small, jnp.where(bits < 0, -lifted, lifted), x)
        # to divide by one and the same number for all, XLA would multiply by its inverse
        y = y / jnp.where(jnp.isnan(x), x, top) if short else y * inverse
        code = jnp.full(x.shape, order[0], jnp.uint8)
        for before, after, bound in zip(order, order[1:], bounds, strict=False):
            # at the bound 0, between fp4's two zeros, x counts unless x / absmax is no f32
            above = y > bound if bound else (bits > 0) & (lifted > absmax * np.float32(2.0 ** (LIFT - 150)))
            code += jnp.where(above, np.uint8((int(after) - int(before)) % 256), np.uint8(0))
        return code

    return encode, absmax


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _lifted(bits: jax.Array) -> jax.Array:
    """2^LIFT times the f32 >= 0 that has these bits; exact below 2^-126 too."""
    tiny = bits.astype(jnp.float32) * np.float32(2.0 ** (LIFT - 149))
    return jnp.where(bits < 1 << 23, tiny, jax.lax.bitcast_convert_type(bits, jnp.float32) * np.float32(2.0**LIFT))


@functools.cache
def _bounds(fmt: str) -> tuple[np.ndarray, np.ndarray]:
    """A format's codes as their levels rise [16], and the middles between neighbours [15]."""
    levels = np.asarray(LEVELS[fmt], np.float32)
    order = np.argsort(levels, kind="stable")
    return order, (levels[order][:-1] + levels[order][1:]) / np.float32(2)


def _by_absmax(x: jax.Array, *, top: int, kind: Any = jnp.float32) -> tuple[Encode, jax.Array]:
    """round(x / scale) with scale = max |x| / top, halves away from zero; int8 in -top..top."""
    scale = _over(jnp.max(jnp.abs(x), axis=-2, keepdims=True), top)
    inverse = _inverse(scale)
    return lambda x: jnp.clip(jax.lax.round(x * inverse), -top, top).astype(jnp.int8), scale.astype(kind)


def _int4(x: jax.Array) -> tuple[Encode, jax.Array]:
    encode, scale = _by_absmax(x, top=7)
    return lambda x: encode(x) & 15, scale


def _q4_0(x: jax.Array) -> tuple[Encode, jax.Array]:
    """floor(x / scale + 8.5) with scale = -extreme / 8, so that the number farthest from zero is met at -8."""
    farthest = jnp.argmax(jnp.abs(x), axis=-2, keepdims=True)
    scale = jnp.take_along_axis(x, farthest, axis=-2) * -0.125
    inverse = _inverse(scale)
    return lambda x: jnp.clip(jnp.floor(rounded(x * inverse) + 8.5), 0, 15), scale.astype(jnp.float16)


def _q4_1(x: jax.Array) -> tuple[Encode, jax.Array, jax.Array]:
    """floor((x - low) / scale + 0.5) with scale = (high - low) / 15."""
    low = jnp.min(x, axis=-2, keepdims=True)
    scale = _over(jnp.max(x, axis=-2, keepdims=True) - low, 15)
    inverse = _inverse(scale)

    def encode(x: jax.Array) -> jax.Array:
        return jnp.clip(jnp.floor(rounded((x - low) * inverse) + 0.5), 0, 15)

    return encode, scale.astype(jnp.float16), low.astype(jnp.float16)


# x f32 [G, group, N] -> what makes codes of any rows of each group, scale [G, 1, N], and with q4_1 low
MAKERS = {
    "nf4": functools.partial(_by_levels, fmt="nf4"),
    "fp4": functools.partial(_by_levels, fmt="fp4"),
    "int4": _int4,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "int8": functools.partial(_by_absmax, top=127),
    "q8_0": functools.partial(_by_absmax, top=127, kind=jnp.float16),
}


def _over(x: jax.Array, n: float) -> jax.Array:
    """x / n for x >= 0 as f32 holds it."""
    return rounded(x / jnp.where(x == 0, np.float32(1), np.float32(n)))


def _inverse(x: jax.Array) -> jax.Array:
    """1 / x, 0 where x is 0."""
    return jnp.where(x == 0, 0, 1 / x)


def _doubled(w: QTensor) -> QTensor:
    """Its scales in 8 bits: absmax = dynamic[code] nested + offset."""
    double = nested_scales
    for _ in w.shape[:-2]:
        double = jax.vmap(double)
    scale, nested, offset = double(w.scale)
    return QTensor(w.packed, scale, None, nested, offset, fmt=w.fmt, dtype=w.dtype)


def nested_scales(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Double quantization: f32 [K/group, 1, N] -> uint8 of that shape, nested f32 [ceil(size / 256)], offset f32 []."""
    blocks, _, n = absmax.shape
    flat = absmax.reshape(blocks, n).T.reshape(-1)  # column after column
    offset = _over(_sum(flat), flat.size)
    centred = jnp.pad(flat - offset, (0, -flat.size % NESTED)).reshape(-1, NESTED)
    nested = jnp.max(jnp.abs(centred), axis=-1, keepdims=True)
    code = jnp.searchsorted(jnp.asarray(_dynamic_bounds()), centred * _inverse(nested), side="right")
    code = jnp.where(nested == 0, 0, code).astype(jnp.uint8).reshape(-1)[: flat.size]
    return code.reshape(n, blocks).T.reshape(absmax.shape), nested.reshape(-1), offset


def _sum(x: jax.Array) -> jax.Array:
    """The sum of x [B] f32 in the order in which torch adds on one thread: the offset's last bit hangs on it."""
    lanes = 8 if x.size >= 8 else 1
    rows, end = x.size // (4 * lanes), x.size // lanes * lanes
    whole = x[: rows * 4 * lanes].reshape(rows, 4, lanes)
    step = max(16, 2 ** (math.ceil(math.log2(max(rows, 1))) // 4))
    sums = []
    for _ in range(3):  # runs of `step` rows, runs of `step` such sums, and so on; what is left over by itself
        cut = len(whole) // step * step
        sums.append(_chain(whole[cut:]))
        whole = _chain(whole[:cut].reshape(-1, step, 4, lanes).swapaxes(0, 1))
    first, *others = sums[0] + sums[1] + sums[2] + _chain(whole)
    for start in range(rows * 4 * lanes, end, lanes):
        first += x[start : start + lanes]
    return functools.reduce(jnp.add, functools.reduce(jnp.add, others, first), _chain(x[end:]))


def _chain(x: jax.Array) -> jax.Array:
    """The sum over the first axis, one after another."""
    return jax.lax.scan(lambda total, row: (total + row, None), jnp.zeros(x.shape[1:], x.dtype), x)[0]


@functools.cache
def _dynamic_bounds() -> np.ndarray:
    """Where codes 1 to 255 of the dynamic map begin, f32 [255], rising.

    bitsandbytes finds codes in a table of 65536 places from -1 to 1 rather than by the nearest level, so that most
    levels near zero are never taken.
    """
    f32 = np.float32
    levels = dynamic_levels()
    place = (f32(-1) + f32(2) * np.arange(65536, dtype=f32) / f32(65535)).astype(f32)
    table = np.searchsorted(f32(0.5) * (levels[:-1] + levels[1:]), place)
    first = np.searchsorted(table, np.arange(256))  # the first place of each code or a higher one
    low, high = np.full(256, -2, f32), np.ones(256, f32)
    for _ in range(64):
        middle = (low + high) / f32(2)
        reached = np.floor((middle + f32(1)) * f32(0.5) * f32(65535) + f32(0.5)) >= first
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return high[1:]
