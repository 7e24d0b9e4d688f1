"""The product of a 4-bit weight on GPUs from sm80 on, in Pallas' Triton.

JAX 0.11 deprecates this backend of Pallas; nothing outside this file knows of it. A weight tile is unpacked in
registers, each number computed in f32 and rounded once, as `qtensor.dense` does; no dense weight reaches memory.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from peftax.ops import qtensor
from peftax.ops.kernels import requirements
from peftax.ops.qtensor import QTensor

FORMATS = ("nf4", "fp4", "int4", "q4_0", "q4_1")
DTYPES = ("bfloat16", "float16")  # what tensor cores take with f32 sums
LEAST = 32  # rows or columns of the smallest weight tile
BAND = 8  # row tiles of x that stay in the second-level cache while all columns of w pass
PROGRAMS = 256  # about two for each of an A100's or an H100's multiprocessors


class Tiles(NamedTuple):
    """One program makes [m, out] of the product, `inner` of the contracted axis at a time, `splits` to an axis."""

    m: int
    out: int
    inner: int
    splits: int
    warps: int
    stages: int


def supports(w: QTensor, m: int, dtype: Any, *, transposed: bool) -> str | None:
    """None if `product` takes an x of m rows and this dtype; else why not."""
    del m, transposed  # rows are padded; both ways take the same tiles
    found = getattr(jax.devices()[0], "compute_capability", "") if jax.default_backend() == "gpu" else ""
    if found.startswith(("5.", "6.", "7.")):
        return f"compute capability {found}; want 8.0 or later"
    if why := requirements.refusal(w, dtype, formats=FORMATS, dtypes=DTYPES):
        return why
    k, n = w.shape
    if _power(k, LEAST) < LEAST or _power(n, LEAST) < LEAST:
        return f"K={k}, N={n}; want multiples of {LEAST}"
    if _power(w.group, LEAST) < LEAST:
        return f"groups of {w.group} rows; want a multiple of {LEAST}"
    return None


def product(x: jax.Array, w: QTensor, *, transposed: bool = False, interpret: bool = False) -> jax.Array:
    """x @ dense(w), or with `transposed` x @ dense(w)ᵀ, the gradient of the first; no dense w in memory.

      y[m, n] = sum_k x[m, k] w[k, n]      or      y[m, k] = sum_n x[m, n] w[k, n]

    Args:
      x: [M, K], or [M, N] if transposed; bfloat16 or float16.
      w: [K, N], of a format in FORMATS.
      transposed: contract with the columns of w.
      interpret: compute on any device, slowly, what the kernel would.

    Returns:
      [M, N], or [M, K] if transposed, in the dtype of x; summed in f32.

    Raises:
      ValueError: `supports` has a reason, or the contracted sizes differ.
    """
    m = x.shape[0]
    why_not = supports(w, m, x.dtype, transposed=transposed)
    requirements.check("triton", x, w, transposed=transposed, why_not=why_not)
    t = tiles(m, w, transposed)
    x = jnp.pad(x, ((0, -m % t.m), (0, 0)))
    y_SxMxO = _call(x, w, t, transposed, interpret)
    y = y_SxMxO[0] if t.splits == 1 else y_SxMxO.sum(axis=0).astype(x.dtype)
    return y[:m]


def tiles(m: int, w: QTensor, transposed: bool) -> Tiles:
    """The largest tiles that are known to stay in registers; few rows split the contracted axis to fill the GPU."""
    inner_size, out_size = w.shape[::-1] if transposed else w.shape
    if m > 64:
        rows, out, inner, warps, stages = 128, 128, 64, 8, 3
    else:
        rows, out, inner, warps, stages = max(16, pl.next_power_of_2(m)), 64, 64, 4, 4
    out, inner = _power(out_size, out), _power(inner_size, inner)
    if transposed:
        out = _of_groups(out, w.group)
    else:
        inner = _of_groups(inner, w.group)
    splits, steps = 1, inner_size // inner
    if m <= 64:
        programs = out_size // out
        while programs * splits < PROGRAMS and steps % (2 * splits) == 0 and steps // splits >= 8:
            splits *= 2
    return Tiles(rows, out, inner, splits, warps, stages)


def _power(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides size."""
    return min(size & -size, most)


def _of_groups(rows: int, group: int) -> int:
    """Rows of a tile that hold whole groups, or lie in one."""
    return rows if rows % group == 0 else _power(group, rows)


def _call(x, w, t, transposed, interpret):
    m = x.shape[0]
    out = w.shape[0] if transposed else w.shape[1]
    dtype = x.dtype if t.splits == 1 else jnp.float32
    scales = [qtensor.scales(w)[:, 0]]
    if w.low is not None:
        scales.append(w.low.astype(jnp.float32)[:, 0])
    args = [x, w.packed, *scales]
    if w.fmt not in _INTEGER:
        args.append(jnp.array(_halves(w.fmt)))
    result = jax.ShapeDtypeStruct((t.splits, m, out), dtype)
    return pl.pallas_call(
        functools.partial(_kernel, t=t, fmt=w.fmt, group=w.group, transposed=transposed),
        out_shape=result,
        grid=(m // t.m * (out // t.out), t.splits),
        compiler_params=plgpu.CompilerParams(num_warps=t.warps, num_stages=t.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * w.size,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in [*args, result]),
            transcendentals=0,
        ),
        interpret=interpret,
        name=f"{w.fmt}_{'dx' if transposed else 'product'}",
    )(*args)


def _kernel(x_ref, packed_ref, scale_ref, *refs, t, fmt, group, transposed):
    *refs, y_ref = refs
    low_ref = refs.pop(0) if fmt == "q4_1" else None
    levels_ref = refs.pop(0) if refs else None
    _, m, out = y_ref.shape
    split = pl.program_id(1)
    i, j = _place(pl.program_id(0), m // t.m, out // t.out)
    rows, outs = pl.ds(i * t.m, t.m), pl.ds(j * t.out, t.out)
    steps = x_ref.shape[1] // t.inner // t.splits
    k, n = (t.out, t.inner) if transposed else (t.inner, t.out)  # of a weight tile

    def tile(s):
        """Which tile of the weight, along K and N, step s takes."""
        s = split * steps + s
        return (j, s) if transposed else (s, j)

    def packed(s):
        k_tile, n_tile = tile(s)
        return packed_ref[pl.ds(k_tile * (k // 2), k // 2), pl.ds(n_tile * n, n)]

    def per_row(ref, s):
        """What the groups of step s share, [k / 2, n]."""
        k_tile, n_tile = tile(s)
        blocks = max(1, k // group)
        block = k_tile * blocks if k >= group else lax.div(k_tile, jnp.int32(group // k))
        value = ref[pl.ds(block, blocks), pl.ds(n_tile * n, n)]
        if blocks > 1:
            value = jnp.broadcast_to(value[:, None], (blocks, k // 2 // blocks, n)).reshape(k // 2, n)
        return jnp.broadcast_to(value, (k // 2, n))

    def weight(s, byte):
        """The dense weight tile of step s, [k, n], in the dtype of x."""
        byte = byte.astype(jnp.int32)
        scale = per_row(scale_ref, s)
        low = None if low_ref is None else per_row(low_ref, s)

        def numbers(code):
            value = _level(levels_ref, code) if levels_ref is not None else _INTEGER[fmt](code).astype(jnp.float32)
            value *= scale
            return (value if low is None else value + low).astype(x_ref.dtype)

        # Triton joins along a new last axis only
        pair = lax.stack([numbers(byte & 15), numbers(byte >> 4)], axis=2)
        return pair.transpose(0, 2, 1).reshape(k, n)

    def step(s, carry):
        y, byte = carry
        # Triton fetches x and scales ahead, but not what a table is read with
        following = packed(jnp.minimum(s + 1, steps - 1))
        x = x_ref[rows, pl.ds((split * steps + s) * t.inner, t.inner)]
        contract = ((1,), (1 if transposed else 0,))
        y += lax.dot_general(x, weight(s, byte), (contract, ((), ())), preferred_element_type=jnp.float32)
        return y, following

    y, _ = lax.fori_loop(0, steps, step, (jnp.zeros((t.m, t.out), jnp.float32), packed(0)))
    y_ref[split, rows, outs] = y.astype(y_ref.dtype)


_INTEGER = {  # formats whose levels are integers
    "int4": lambda code: (code ^ 8) - 8,
    "q4_0": lambda code: code - 8,
    "q4_1": lambda code: code,
}


def _halves(fmt: str) -> np.ndarray:
    """The levels of a format as the upper and the lower 16 bits of their f32, uint16 [2, 16].

    Triton stages loads of 32 bits or more through shared memory, steps ahead: right for tiles, not for a table.
    """
    bits = np.array(qtensor.LEVELS[fmt], np.float32).view(np.uint32)
    return np.stack([bits >> 16, bits & 0xFFFF]).astype(np.uint16)


def _level(halves_ref, code):
    upper, lower = (halves_ref[half, code].astype(jnp.uint32) for half in range(2))
    return lax.bitcast_convert_type(upper << 16 | lower, jnp.float32)


def _place(program, m_tiles, out_tiles):
    """Row and column tile of a program: in bands of rows, down first, so that neighbours share x and w."""
    band = lax.div(program, jnp.int32(BAND * out_tiles))
    height = jnp.minimum(m_tiles - band * BAND, BAND)
    within = lax.rem(program, jnp.int32(BAND * out_tiles))
    return band * BAND + lax.rem(within, height), lax.div(within, height)
