"""The product of a packed weight on a TPU, in Pallas' Mosaic.

A tile of the weight becomes numbers in VMEM, each computed in f32 and rounded once as `qtensor.dense` does, and is then
multiplied with up to ROWS rows of x; no dense weight reaches HBM. Unpacking stands in one block of instructions
with the first of those products: the compiler fills the vector units' slots while the matrix units work.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from peftax.ops import qtensor
from peftax.ops.kernels import requirements
from peftax.ops.qtensor import LEVELS, QTensor

DTYPES = ("bfloat16", "float32")
INTEGERS = ("int4", "q4_0", "q4_1")  # formats whose levels are integers
LANES, SUBLANES = 128, 8
STRIP = 64  # rows of w in 32 bytes, the height of a register of bytes
ROWS = 8192  # of x that one unpacked tile of w meets at most, where their sums wait in VMEM
KINDS = {  # what devices call themselves -> a key of the table
    **{"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p"},
    **{"TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"},
}
SMALLEST = "tpu7x"  # of the kinds in VMEM
TABLE = json.loads((Path(__file__).parent / "tiles" / "tpu.json").read_text())


class Tiles(NamedTuple):
    """One step multiplies [m, inner] of x with a tile of w and adds to [m, out] of the product."""

    m: int
    out: int
    inner: int


def supports(w: QTensor, m: int, dtype: Any, *, transposed: bool) -> str | None:
    """None if `product` takes an x of m rows and this dtype; else why not."""
    if why := requirements.refusal(w, dtype, formats=LEVELS, dtypes=DTYPES):
        return why
    if (kind := _device_kind()).startswith("TPU") and kind not in KINDS:
        return f"device {kind}; it was compiled for {', '.join(sorted(set(KINDS.values())))}"
    k, n = w.shape
    if m < 1:
        return "x has no rows"
    if k % STRIP or n % LANES:
        return f"K={k}, N={n}; want multiples of {STRIP} and {LANES}"
    if k % w.group or w.group % 32:
        return f"groups of {w.group} rows in K={k}; want a multiple of 32 that divides K"
    if choose(m, w, dtype, transposed=transposed) is None:
        return f"K={k}, N={n}: no tile of them fits in VMEM"
    return None


def product(
    x: jax.Array, w: QTensor, *, transposed: bool = False, tiles: Tiles | None = None, interpret: bool = False
) -> jax.Array:
    """x @ dense(w), or with `transposed` x @ dense(w)ᵀ, the gradient of the first; no dense w in HBM.

      y[m, n] = sum_k x[m, k] w[k, n]      or      y[m, k] = sum_n x[m, n] w[k, n]

    w is rounded to the dtype of x. With f32 the matrix units make f32 products of several passes, not the bf16 products
    that XLA makes of f32 by default.

    Args:
      x: [M, K], or [M, N] if transposed; bfloat16 or float32.
      w: [K, N].
      transposed: contract with the columns of w.
      tiles: what `choose` gives, if None.
      interpret: compute on any device, slowly, what the kernel would.

    Returns:
      [M, N], or [M, K] if transposed, in the dtype of x; summed in f32.

    Raises:
      ValueError: `supports` has a reason, or the contracted sizes differ.
    """
    m = x.shape[0]
    why_not = supports(w, m, x.dtype, transposed=transposed)
    requirements.check("tpu", x, w, transposed=transposed, why_not=why_not)
    t = tiles or choose(m, w, x.dtype, transposed=transposed)
    assert t is not None  # `supports` found tiles
    if t != _dividing(t, w, transposed) or t.m % 16:
        raise ValueError(f"tpu.product: {t} do not divide w {w.shape} in groups of {w.group}, {transposed=}, or 16 m")
    padded = -(-m // t.m) * t.m
    return _call(jnp.pad(x, ((0, padded - m), (0, 0))), w, t, transposed, interpret)[:m]


def choose(m: int, w: QTensor, dtype: Any, *, transposed: bool, kind: str | None = None) -> Tiles | None:
    """Tiles for x of m rows: the device's first entry in tiles/tpu.json for this product, made to divide it.

    An entry with `rows` is for at most so many; one with fmt, k, n or transposed for that one only.

    Args:
      kind: a key of the table; if None, that of the default device.

    Returns:
      None if nothing fits in VMEM.
    """
    machine = TABLE[kind or _kind()]
    product = {"fmt": w.fmt, "k": w.shape[0], "n": w.shape[1], "transposed": transposed}
    entries = [e for e in machine["tiles"] if m <= e.get("rows", m)]
    entry = next(e for e in entries if all(e.get(key, value) == value for key, value in product.items()))
    rows = -(-m // -(-m // entry["m"]))  # as even as can be
    out, inner = entry["out"], entry["inner"]
    while min(out, inner) >= LANES:
        t = _dividing(Tiles(-(-rows // 16) * 16, out, inner), w, transposed)
        if _vmem(t, m, w, jnp.dtype(dtype), transposed) <= machine["vmem_mib"] << 20:
            return t
        out, inner = (out, inner // 2) if t.inner > t.out else (out // 2, inner)
    return None


def _kind() -> str:
    return KINDS.get(_device_kind(), SMALLEST)


def _device_kind() -> str:
    return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).device_kind


def _dividing(t: Tiles, w: QTensor, transposed: bool) -> Tiles:
    """The largest tiles up to t that divide w."""
    k, n = w.shape
    if transposed:
        return Tiles(t.m, _divisor(k, t.out, w.group), _divisor(n, t.inner, 1))
    return Tiles(t.m, _divisor(n, t.out, 1), _divisor(k, t.inner, w.group))


def _divisor(size: int, most: int, group: int) -> int:
    """The largest tile up to `most` of an axis in groups, of whole registers; the axis if it has none."""
    for tile in range(min(most, size) // LANES * LANES, 0, -LANES):
        if size % tile == 0 and (tile % group == 0 or group % tile == 0):
            return tile
    return size


def _grid(m: int, w_shape: tuple[int, ...], t: Tiles, transposed: bool) -> tuple[int, int, int, int]:
    """Rounds of rows, tiles of the product's columns, of the contracted axis, and tiles of rows in a round."""
    inner_size, out_size = w_shape[::-1] if transposed else w_shape
    blocks, inners = -(-m // t.m), inner_size // t.inner
    # Without sums to keep all rows are one round
    reuse = -(-blocks // -(-m // ROWS)) if inners > 1 else blocks
    return -(-blocks // reuse), out_size // t.out, inners, reuse


def _vmem(t: Tiles, m: int, w: QTensor, dtype: Any, transposed: bool) -> int:
    """Bytes: blocks twice, for one is fetched while the other is read; what is unpacked and summed, once."""
    *_, inners, reuse = _grid(m, w.shape, t, transposed)
    k = t.out if transposed else t.inner
    tile = t.out * t.inner
    groups = max(1, k // w.group) * (tile // k) * (1 if w.low is None else 2)
    blocks = dtype.itemsize * t.m * (t.inner + t.out) + tile // w.per_byte + 4 * groups
    sums = 4 * t.m * t.out * (1 + (reuse if inners > 1 else 0))
    return 2 * blocks + dtype.itemsize * tile + sums


def _call(x, w, t, transposed, interpret):
    m = x.shape[0]
    rounds, outs, inners, reuse = grid = _grid(m, w.shape, t, transposed)
    k, n = (t.out, t.inner) if transposed else (t.inner, t.out)  # of a tile of w

    def rows(i, r):
        return jnp.minimum(i * reuse + r, m // t.m - 1)  # the last round repeats its last tile

    def tile(j, c):
        return (j, c) if transposed else (c, j)

    def groups(i, j, c, r):
        k_tile, n_tile = tile(j, c)
        return (k_tile if k >= w.group else lax.div(k_tile * k, w.group)), 0, n_tile

    def sums(i, j, c, r):
        # Until the last c the sums are not whole: what stands in the round's first block is not written back
        return rows(i, jnp.where(c == inners - 1, r, 0)), j

    scale = pl.BlockSpec((max(1, k // w.group), 1, n), groups)
    args = [(x, pl.BlockSpec((t.m, t.inner), lambda i, j, c, r: (rows(i, r), c)))]
    args += [(w.packed, pl.BlockSpec((k // w.per_byte, n), lambda i, j, c, r: tile(j, c)))]
    args += [(qtensor.scales(w), scale)]
    if w.low is not None:
        args += [(w.low.astype(jnp.float32), scale)]
    if LEVELS[w.fmt] is not None and w.fmt not in INTEGERS:  # an argument, for a kernel captures no arrays
        args += [(_levels(w.fmt, x.dtype), pl.BlockSpec((16, LANES), lambda i, j, c, r: (0, 0)))]
    y = jax.ShapeDtypeStruct((m, outs * t.out), x.dtype)
    pairs = w.fmt in ("nf4", "fp4") and x.dtype == jnp.bfloat16  # two rows to a word, as memory holds them
    scratch = [pltpu.VMEM((k // 2, n), jnp.int32) if pairs else pltpu.VMEM((k, n), x.dtype)]
    if inners > 1:
        scratch += [pltpu.VMEM((reuse, t.m, t.out), jnp.float32)]
    return pl.pallas_call(
        functools.partial(_kernel, fmt=w.fmt, group=w.group, transposed=transposed, reuse=reuse, summed=inners > 1),
        out_shape=y,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=grid,
            in_specs=[spec for _, spec in args],
            out_specs=pl.BlockSpec((t.m, t.out), sums),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_vmem(t, m, w, x.dtype, transposed) * 5 // 4 + (4 << 20),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * w.size,
            bytes_accessed=x.nbytes * outs + sum(a.nbytes for a, _ in args[1:]) * rounds + y.size * y.dtype.itemsize,
            transcendentals=0,
        ),
        name=f"{w.fmt}_{'dx' if transposed else 'product'}",
        interpret=interpret,
    )(*(a for a, _ in args))


def _levels(fmt: str, dtype: Any) -> jax.Array:
    """f32 [16, LANES]; for bf16 in the order 0, 8, 1, 9, ..., so that rows c and c + 8 share a word."""
    levels = jnp.array(LEVELS[fmt], jnp.float32)
    if dtype == jnp.bfloat16:
        levels = levels.reshape(2, 8).T.reshape(16)
    return jnp.broadcast_to(levels[:, None], (16, LANES))


def _kernel(x_ref, packed_ref, scale_ref, *refs, fmt, group, transposed, reuse, summed):
    refs = list(refs)
    sums_ref = refs.pop() if summed else None
    *given, y_ref, tile_ref = refs
    low_ref = given.pop(0) if fmt == "q4_1" else None
    levels_ref = given.pop(0) if given else None

    def numbers(value, row):
        """Codes' values as numbers of the group that has a row of the tile, f32."""
        value *= scale_ref[row // group]
        return value if low_ref is None else value + low_ref[row // group]

    def unpack():
        if LEVELS[fmt] is None:
            _unpack_bytes(packed_ref, tile_ref, numbers)
        elif fmt in INTEGERS:
            _unpack_integers(packed_ref, tile_ref, numbers, fmt)
        elif x_ref.dtype == jnp.bfloat16:
            _unpack_pairs(packed_ref, tile_ref, numbers, levels_ref, group)
        else:
            _unpack_rows(packed_ref, tile_ref, numbers, levels_ref, group)

    c, r = pl.program_id(2), pl.program_id(3)
    multiply = functools.partial(_multiply, x_ref, tile_ref, y_ref, sums_ref, transposed, c, r)
    if reuse == 1:
        unpack()
        multiply()
        return

    @pl.when(r == 0)
    def _():
        unpack()
        multiply()

    @pl.when(r > 0)
    def _():
        multiply()


def _multiply(x_ref, tile_ref, y_ref, sums_ref, transposed, c, r):
    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    w = tile_ref[...]
    if w.dtype == jnp.int32:
        w = pltpu.bitcast(w, jnp.bfloat16)
    y = lax.dot_general(x_ref[...], w, contract, precision, jnp.float32)
    if sums_ref is not None:
        y += jnp.where(c == 0, 0.0, sums_ref[r])  # not times 0: memory starts as anything
        sums_ref[r] = y
    y_ref[...] = y.astype(y_ref.dtype)


def _unpack_bytes(packed_ref, tile_ref, numbers):
    for top in range(0, tile_ref.shape[0], 32):
        rows = pl.ds(top, 32)
        tile_ref[rows] = numbers(packed_ref[rows].astype(jnp.float32), top).astype(tile_ref.dtype)


def _unpack_integers(packed_ref, tile_ref, numbers, fmt):
    """Codes are read as the hardware's int4, what is added or taken away being 8."""
    for top in range(0, tile_ref.shape[0], STRIP):
        code = packed_ref[pl.ds(top // 2, STRIP // 2)]
        if fmt != "int4":
            code = pltpu.bitcast(code, jnp.int32) ^ -0x77777778  # 0x88888888: codes less 8, in two's complement
        value = pltpu.bitcast(code, jnp.int4).astype(jnp.float32)
        if fmt == "q4_1":
            value += 8
        for at in range(0, STRIP, 32):
            rows = lax.slice_in_dim(value, at, at + 32)
            tile_ref[pl.ds(top + at, 32)] = numbers(rows, top + at).astype(tile_ref.dtype)


def _unpack_pairs(packed_ref, tile_ref, numbers, levels_ref, group):
    """16 rows of bf16 from 8 rows of bytes: even and odd rows are the halves of a word, as their codes are of a byte.

    Tables of words for either half, the other being zero.
    """
    levels = _wide(levels_ref[...], tile_ref.shape[1])
    even = odd = None
    for row, codes in _codes(packed_ref):
        if even is None or row % group == 0:
            pair = pltpu.bitcast(numbers(levels, row).astype(jnp.bfloat16), jnp.int32)  # of codes c and c + 8
            even = pair & 0xFFFF, lax.shift_right_logical(pair, 16)
            odd = pair << 16, pair & -0x10000
        tile_ref[pl.ds(row // 2, SUBLANES)] = _look_up(even, *codes[0]) | _look_up(odd, *codes[1])


def _unpack_rows(packed_ref, tile_ref, numbers, levels_ref, group):
    """8 rows of f32 at a time. Codes are read as the hardware's int4: those of 8 and more are negative."""
    levels = _wide(levels_ref[...], tile_ref.shape[1])
    tables = None
    for top in range(0, tile_ref.shape[0], STRIP):
        code_64xN = pltpu.bitcast(packed_ref[pl.ds(top // 2, STRIP // 2)], jnp.int4).astype(jnp.int32)
        for at in range(0, STRIP, SUBLANES):
            if tables is None or (top + at) % group == 0:
                tables = numbers(levels[:SUBLANES], top + at), numbers(levels[SUBLANES:], top + at)
            code = lax.slice_in_dim(code_64xN, at, at + SUBLANES)
            tile_ref[pl.ds(top + at, SUBLANES)] = _look_up(tables, code & 7, code < 0)


def _codes(packed_ref):
    """Of every 16 rows: the first; of the even and of the odd ones, codes mod 8 and which are 8 or more."""
    for top in range(0, packed_ref.shape[0], 32):
        bytes_32xN = packed_ref[pl.ds(top, 32)].astype(jnp.int8).astype(jnp.int32)
        for at in range(0, 32, SUBLANES):
            byte = lax.slice_in_dim(bytes_32xN, at, at + SUBLANES)
            yield 2 * (top + at), ((byte & 7, byte & 8 != 0), ((byte >> 4) & 7, byte < 0))


def _look_up(tables_8xN, index_8xN, large_8xN):
    """What is fast is a gather within a register, from eight rows: two, of codes under 8 and of those over."""
    small, large = (jnp.take_along_axis(t, index_8xN, axis=0, mode="promise_in_bounds") for t in tables_8xN)
    return jnp.where(large_8xN, large, small)


def _wide(levels_16xL, n):
    return jnp.concatenate([levels_16xL] * (n // LANES), axis=1)
