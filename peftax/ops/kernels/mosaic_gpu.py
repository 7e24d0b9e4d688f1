"""The product of a 4-bit weight on an H100 (sm90), in Pallas' Mosaic GPU with warpgroup matrix instructions.

A weight tile is unpacked in registers, its even rows and its odd ones, and stands in shared memory as the even rows
followed by the odd: nothing is interleaved in the kernel. x comes in, or dx goes out, in that order of K.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from peftax.ops import qtensor
from peftax.ops.kernels import requirements
from peftax.ops.qtensor import QTensor

FORMATS = ("nf4", "fp4", "int4", "q4_0", "q4_1")
DTYPES = ("bfloat16", "float16")
TILE = 128  # rows and columns of y that one warpgroup holds
INNER = 64  # of the contracted axis at a time: the 128 bytes that one swizzle spans
STAGES = (
    3  # tiles under way; with these, two programs share a multiprocessor and one unpacks while the other multiplies
)
BAND = 8  # row tiles of x that stay in the second-level cache while all columns of w pass

SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # as wgmma reads 16-bit numbers
# A byte tile over the threads: 8 rows to a warp, 4 neighbours to a thread.
BYTES = plgpu.Layout.TILED(plgpu.Tiling(((32, 16), (8, 16), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def supports(w: QTensor, m: int, dtype: Any, *, transposed: bool) -> str | None:
    """None if `product` takes an x of m rows and this dtype; else why not."""
    found = getattr(jax.devices()[0], "compute_capability", "") if jax.default_backend() == "gpu" else ""
    if found not in ("", "9.0"):
        return f"compute capability {found}; only 9.0 has these instructions"
    if why := requirements.refusal(w, dtype, formats=FORMATS, dtypes=DTYPES):
        return why
    if m <= TILE // 2:
        return f"M={m}; a tile has {TILE} rows, which that many would leave empty"
    k, n = w.shape
    of_k, of_n = (TILE, INNER) if transposed else (INNER, TILE)
    if k % of_k or n % of_n:
        return f"K={k}, N={n}; want multiples of {of_k} and {of_n}"
    if w.group % 32 or (w.group % of_k and of_k % w.group):
        return f"groups of {w.group} rows; want 32, or a multiple or divisor of {of_k}"
    return None


def product(x: jax.Array, w: QTensor, *, transposed: bool = False, interpret: bool = False) -> jax.Array:
    """x @ dense(w), or with `transposed` x @ dense(w)ᵀ, the gradient of the first; no dense w in memory.

      y[m, n] = sum_k x[m, k] w[k, n]      or      y[m, k] = sum_n x[m, n] w[k, n]

    Args:
      x: [M, K], or [M, N] if transposed; bfloat16 or float16.
      w: [K, N], of a format in FORMATS.
      transposed: contract with the columns of w.
      interpret: compute on a CPU, slowly, what the kernel would, copies and barriers included.

    Returns:
      [M, N], or [M, K] if transposed, in the dtype of x; summed in f32.

    Raises:
      ValueError: `supports` has a reason, or the contracted sizes differ.
    """
    m = x.shape[0]
    why_not = supports(w, m, x.dtype, transposed=transposed)
    requirements.check("mosaic_gpu", x, w, transposed=transposed, why_not=why_not)
    x = jnp.pad(x, ((0, -m % TILE), (0, 0)))
    if transposed:
        return _even_odd(_call(x, w, True, interpret), TILE // 2, 2)[:m]
    return _call(_even_odd(x, 2, INNER // 2), w, False, interpret)[:m]


def _even_odd(x, outer, inner):
    """x [M, K] with each run of inner * outer columns, read as a matrix [inner, outer], transposed."""
    return x.reshape(x.shape[0], -1, inner, outer).swapaxes(2, 3).reshape(x.shape)


def _call(x, w, transposed, interpret) -> Any:
    """x with whole tiles of rows; under vmap all rows in one call, or one call for each weight."""

    def over_many(size, mapped, x, w):
        if not any(jax.tree.leaves(mapped[1])):
            y = call(x.reshape(-1, x.shape[-1]), w)
            return y.reshape(size, -1, y.shape[-1]), True

        def one(i):
            return call(*jax.tree.map(lambda a, on: a[i] if on else a, (x, w), tuple(mapped)))

        return lax.map(one, jnp.arange(size)), True

    call = jax.custom_batching.custom_vmap(functools.partial(_launch, transposed=transposed, interpret=interpret))
    call.def_vmap(over_many)
    return call(x, w)


def _launch(x, w, transposed, interpret) -> Any:
    m, out = x.shape[0], w.shape[0] if transposed else w.shape[1]
    args = [x, w.packed, qtensor.scales(w)[:, 0]]
    if w.low is not None:
        args.append(w.low.astype(jnp.float32)[:, 0])
    result = jax.ShapeDtypeStruct((m, out), x.dtype)
    name = f"{w.fmt}_{'dx' if transposed else 'product'}"
    return pl.kernel(
        functools.partial(_kernel, fmt=w.fmt, group=w.group, transposed=transposed, interpret=interpret),
        out_type=result,
        mesh=plgpu.Mesh(grid=(m // TILE * (out // TILE),), grid_names=("tile",), kernel_name=name),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * w.size,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in [*args, result]),
            transcendentals=0,
        ),
        interpret=_interpreter() if interpret else False,
        name=name,
    )(*args)


def _interpreter() -> Any:
    if (public := getattr(plgpu, "InterpretGPUParams", None)) is not None:
        return public()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # JAX 0.10 has no public name for it

    return InterpretGPUParams()


def _kernel(x_gmem, packed_gmem, scale_gmem, *rest, fmt, group, transposed, interpret):
    *low_gmem, y_gmem = rest
    k, n = (TILE, INNER) if transposed else (INNER, TILE)  # of a weight tile
    half, blocks = k // 2, max(1, k // group)
    i, j = plgpu.planar_snake(lax.axis_index("tile"), (y_gmem.shape[0] // TILE, y_gmem.shape[1] // TILE), 0, BAND)
    dtype = x_gmem.dtype
    turned = transposed and interpret  # the interpreter knows no transposed references

    def of_w(s):
        return (j, s) if transposed else (s, j)

    def of_scale(s):
        k_tile, n_tile = of_w(s)
        return lax.div(k_tile, max(1, group // k)), n_tile

    def per_row(ref):
        """What the groups of a tile share, [blocks, n] -> [half, n]."""
        rows = [lax.broadcast_in_dim(ref[b], (half, n), (1,)) for b in range(blocks)]
        if blocks > 1:
            row = lax.broadcasted_iota(jnp.int32, (half, n), 0)
            for b in range(1, blocks):
                rows[b] = jnp.where(row < b * (half // blocks), rows[b - 1], rows[b])
        return rows[-1]

    def program(w_ref, y_ref):
        pl.run_scoped(functools.partial(accumulate, w_ref, y_ref), plgpu.WGMMAAccumulatorRef((TILE, TILE), jnp.float32))

    def accumulate(w_ref, y_ref, sum_ref):
        def step(_, x_ref, packed_ref, scale_ref, *low_ref):
            byte = packed_ref[...]
            byte = (byte if interpret else plgpu.layout_cast(byte, BYTES)).astype(jnp.int32)
            scale = per_row(scale_ref)
            low = [per_row(ref) for ref in low_ref]
            for odd, code in enumerate((byte & 15, byte >> 4)):
                value = sum(low, _level(code, fmt) * scale).astype(dtype)
                if turned:
                    w_ref[:, pl.ds(odd * half, half)] = value.T
                else:
                    w_ref[pl.ds(odd * half, half)] = value
            plgpu.commit_smem()
            plgpu.wgmma(sum_ref, x_ref, plgpu.transpose_ref(w_ref, (1, 0)) if transposed and not turned else w_ref)
            plgpu.wgmma_wait(0)  # the next step writes to w_ref

        of_scales = plgpu.BlockSpec((blocks, n), of_scale)
        plgpu.emit_pipeline(
            step,
            grid=(x_gmem.shape[1] // INNER,),
            in_specs=[
                plgpu.BlockSpec((TILE, INNER), lambda s: (i, s), transforms=SWIZZLED),
                plgpu.BlockSpec((half, n), of_w),
                of_scales,
                *[of_scales for _ in low_gmem],
            ],
            max_concurrent_steps=STAGES,
        )(x_gmem, packed_gmem, scale_gmem, *low_gmem)
        y_ref[...] = sum_ref[...].astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_ref, y_gmem.at[pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)])
        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
        program,
        plgpu.SMEM((n, k) if turned else (k, n), dtype, transforms=SWIZZLED),
        plgpu.SMEM((TILE, TILE), dtype, transforms=SWIZZLED),
    )


def _level(code, fmt):
    """levels[code], f32: no gather here, so a tree of selects for levels that are not integers."""
    match fmt:
        case "int4":
            return ((code ^ 8) - 8).astype(jnp.float32)
        case "q4_0":
            return (code - 8).astype(jnp.float32)
        case "q4_1":
            return code.astype(jnp.float32)
    return qtensor.look_up(code, qtensor.LEVELS[fmt] or ())
