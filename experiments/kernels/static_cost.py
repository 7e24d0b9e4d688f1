"""What the TPU kernels cost on paper: compiled for chips that are not here, their instructions counted.

  python -m experiments.kernels.static_cost --out=experiments/kernels/tpu.md [--kinds=v5e,v6e --formats=nf4]

A bundle is what one cycle issues. A step of a kernel's grid costs at least its bundles (stalls are not counted), what
its multiplications take in the matrix units, and what its blocks take from HBM. Beside every kernel stands one of the
same tiles for a bf16 weight. Needs the packages of `make aot`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

DUMP = tempfile.TemporaryDirectory()
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={DUMP.name} --xla_jf_dump_llo_text=true",  # read as libtpu loads
}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from peftax import machines  # noqa: E402
from peftax.ops.kernels import tpu  # noqa: E402
from peftax.ops.qtensor import LEVELS, QTensor  # noqa: E402


class Chip(NamedTuple):
    """One jax device. Peaks as jax's pltpu.get_tpu_info has them; the clock is peak over operations a cycle."""

    name: str
    flops: float
    bandwidth: float
    cores: int
    flops_per_cycle: int  # of a core: its matrix units' multiplications and additions

    @property
    def clock(self) -> float:
        return self.flops / self.cores / self.flops_per_cycle


CHIPS = {
    "v5e": Chip("v5e:1x1", 197e12, 0.82e12, 1, 4 * 2 * 128**2),
    "v5p": Chip("v5p:1x1x1", 459e12, 2.46e12, 2, 4 * 2 * 128**2),
    "v6e": Chip("v6e:1x1", 920e12, 1.64e12, 1, 4 * 2 * 256**2),
    "tpu7x": Chip("tpu7x:1x1x1", 1155e12, 3.7e12, 1, 4 * 2 * 256**2),
}

SHAPES = {  # K, N
    "8B": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)],
    "70B": [(8192, 8192), (8192, 28672), (28672, 8192)],
}


class Case(NamedTuple):
    fmt: str  # or "bf16"
    m: int
    k: int
    n: int
    transposed: bool
    dtype: str = "bfloat16"

    @property
    def group(self) -> int:
        return {"int8": self.k, "nf4": 64, "fp4": 64, "int4": 64}.get(self.fmt, 32)


class Cost(NamedTuple):
    """Of one product on one device: in thousands of cycles."""

    bundles: float
    ideal: float  # of the matrix units
    bytes: float
    steps: float  # each step's bundles or ideal, whichever is more: no overlap from step to step
    temporaries: int
    seconds: float  # to compile

    @property
    def total(self) -> float:
        """The bar's figure."""
        return max(self.bundles, self.ideal, self.bytes)

    @property
    def strict(self) -> float:
        return max(self.steps, self.bytes)


def weight(case: Case, place) -> QTensor:
    """An abstract one."""

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    bits = jnp.uint8 if LEVELS[case.fmt] is not None else jnp.int8
    packed = array((case.k // (2 if bits == jnp.uint8 else 1), case.n), bits)
    scale = array((case.k // case.group, 1, case.n), jnp.float32)
    return QTensor(packed, scale, scale if case.fmt == "q4_1" else None, fmt=case.fmt)


@functools.cache
def measure(kind: str, case: Case, tiles: tpu.Tiles | None = None) -> tuple[tpu.Tiles, Cost]:
    """Compile for a chip that is not here; the bytes of the weight as the case's format has them."""
    chip = CHIPS[kind]
    place = SingleDeviceSharding(machines.tpu(chip.name)[0])
    w = weight(case._replace(fmt="nf4") if case.fmt == "bf16" else case, place)
    t = tiles or tpu.choose(case.m, w, case.dtype, transposed=case.transposed, kind=kind)
    if t is None:
        raise ValueError(f"{case} has no tiles on {kind}")
    wide = case.n if case.transposed else case.k
    x = jax.ShapeDtypeStruct((case.m, wide), case.dtype, sharding=place)
    if case.fmt == "bf16":
        operand = jax.ShapeDtypeStruct((case.k, case.n), jnp.bfloat16, sharding=place)
        kernel = functools.partial(dense_product, t=t, transposed=case.transposed)
        weight_bytes = 2 * case.k * case.n
    else:
        operand = w
        kernel = functools.partial(tpu.product, tiles=t, transposed=case.transposed)
        weight_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(w))
    start = time.perf_counter()
    compiled = jax.jit(kernel).trace(x, operand).lower(lowering_platforms=("tpu",)).compile()
    seconds = time.perf_counter() - start
    rounds, outs, inners, reuse = tpu._grid(case.m, (case.k, case.n), t, case.transposed)
    first, rest = step_bundles(dumped(), branches=case.fmt != "bf16" and reuse > 1)
    every = rounds * outs * inners / chip.cores  # first steps; to each, reuse - 1 others
    ideal = 2 * t.m * t.out * t.inner / chip.flops_per_cycle
    size = jnp.dtype(case.dtype).itemsize
    moved = size * case.m * (wide * outs + t.out * outs) + weight_bytes * rounds
    return t, Cost(
        bundles=every * (first + (reuse - 1) * rest) / 1e3,
        ideal=every * reuse * ideal / 1e3,
        bytes=moved / chip.bandwidth * chip.clock / 1e3,
        steps=every * (max(first, ideal) + (reuse - 1) * max(rest, ideal)) / 1e3,
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        seconds=seconds,
    )


def dumped() -> str:
    """The schedule of the one kernel compiled since the last call."""
    found = ""
    for path in Path(DUMP.name).iterdir():
        if re.search(r"-(\w+_product|\w+_dx)\.\d+-\d+-final_bundles.txt$", path.name):
            found = path.read_text()
        path.unlink()
    if not found:
        raise RuntimeError("libtpu wrote no final_bundles.txt: its flags --xla_jf_dump_to have changed")
    return found


def step_bundles(text: str, *, branches: bool) -> tuple[int, int]:
    """Bundles of a grid step that unpacks, and of one that does not: all of the loop but the other's branch."""
    lines = [line for line in text.splitlines() if re.match(r"\s*(0|0x[0-9a-f]+)\s.*:", line)]
    address = [int(line.split()[0].rstrip(":"), 16) for line in lines]
    heads = [at for at, line in zip(address, lines, strict=True) if re.match(r"\s*\S+\s+LB\b", line)]
    ends = [at for at, line in zip(address, lines, strict=True) if "sbr.rel" in line and heads and at > heads[0]]
    loop = max(ends) - heads[0] + 1 if heads else len(lines)
    if not branches:
        return loop, loop
    longest = sorted(_branches(text), key=lambda b: b[0] - b[1])
    # a branch that holds others is the pipeline's
    leaves = [b for b in longest if not any(b[0] <= o[0] and o[1] <= b[1] for o in longest if o != b)]
    (first_start, first_end), (rest_start, rest_end) = sorted(leaves[:2])
    return loop - (rest_end - rest_start), loop - (first_end - first_start)


def _branches(text: str) -> Iterator[tuple[int, int]]:
    """Where predicated code starts and ends."""
    regions, jumps, at = {}, [], 0
    for line in text.splitlines():
        if match := re.match(r"\s*(0|0x[0-9a-f]+)\s.*:", line):
            at = int(match[1], 16)
        if match := re.search(r"sbr\.rel .*?target = \$region(\d+)", line):
            jumps.append((at, match[1]))
        for number in re.findall(r"(?:Start region|empty region) (\d+)", line):
            regions.setdefault(number, at)
    for start, number in jumps:
        if regions.get(number, 0) > start:
            yield start, regions[number]


def dense_product(x, w, *, t: tpu.Tiles, transposed: bool):
    """What the kernels are held against: their grid and blocks with a bf16 weight."""
    rounds, outs, inners, reuse = grid = tpu._grid(x.shape[0], w.shape, t, transposed)
    k, n = (t.out, t.inner) if transposed else (t.inner, t.out)

    def kernel(x_ref, w_ref, y_ref, *sums):
        tpu._multiply(x_ref, w_ref, y_ref, *sums or [None], transposed, pl.program_id(2), pl.program_id(3))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], outs * t.out), x.dtype),
        grid=grid,
        in_specs=[
            pl.BlockSpec((t.m, t.inner), lambda i, j, c, r: (i * reuse + r, c)),
            pl.BlockSpec((k, n), lambda i, j, c, r: (j, c) if transposed else (c, j)),
        ],
        out_specs=pl.BlockSpec((t.m, t.out), lambda i, j, c, r: (i * reuse + jnp.where(c == inners - 1, r, 0), j)),
        scratch_shapes=[pltpu.VMEM((reuse, t.m, t.out), jnp.float32)] if inners > 1 else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=100 << 20
        ),
        name=f"bf16_{'dx' if transposed else 'product'}",
    )(x, w)


def row(kind: str, case: Case, tiles: tpu.Tiles | None) -> str:
    t, cost = measure(kind, case, tiles)
    _, bf16 = measure(kind, case._replace(fmt="bf16"), t)
    if cost.temporaries > case.k * case.n / 4:  # half of the packed weight
        raise RuntimeError(f"{case} on {kind} keeps {cost.temporaries} bytes in HBM, of the size of a weight")
    print(kind, case, t, cost, bf16, sep="\n  ", flush=True)
    way = "dx" if case.transposed else "forward"
    figures = " | ".join(f"{v:.0f}" for v in (cost.bundles, cost.ideal, cost.bytes, cost.total))
    ratios = f"{cost.total / bf16.total:.3f} | {cost.strict / bf16.strict:.3f}"
    return (
        f"| {kind} | {case.fmt} | {way} | {case.m} | {case.k} | {case.n} | {t.m} · {t.out} · {t.inner} "
        f"| {figures} | {ratios} | {cost.temporaries} |\n"
    )


HEAD = """# The TPU kernels of a packed weight, on paper

Made by `python -m experiments.kernels.static_cost`; what the columns mean stands in README.md. Thousands of cycles.

| chip | weight | | M | K | N | tiles | bundles | matrix units | HBM | cost | of bf16's | by steps | temp |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="rows are added to it; it is begun if missing")
    parser.add_argument("--kinds", default=",".join(CHIPS))
    parser.add_argument("--formats", default="nf4")
    parser.add_argument("--sizes", default="2048,8192")
    parser.add_argument("--shapes", default="4096x4096", help="KxN, or 8B, 70B")
    parser.add_argument("--tiles", help="rows of x, columns of the product, contracted; default: the device's table")
    args = parser.parse_args(argv)
    tiles = tpu.Tiles(*map(int, args.tiles.split("x"))) if args.tiles else None
    shapes = []
    for name in args.shapes.split(","):
        shapes += SHAPES.get(name) or [tuple(map(int, name.split("x")))]
    cases = itertools.product(args.formats.split(","), args.sizes.split(","), shapes, (False, True))
    if not args.out.exists():
        args.out.write_text(HEAD)
    for kind, (fmt, m, (k, n), transposed) in itertools.product(args.kinds.split(","), list(cases)):
        line = row(kind, Case(fmt, int(m), k, n, transposed), tiles)
        with args.out.open("a") as file:
            file.write(line)


if __name__ == "__main__":
    main()
