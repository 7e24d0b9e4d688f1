"""Compile the GPU kernels of a packed weight for an A100 and an H100 that are not here, down to machine code.

  python -m experiments.kernels.gpu --out=experiments/kernels/gpu.md [--only=h100,mosaic_gpu]

Writes one row a kernel: its registers, its spilled bytes, and the temporaries in the GPU's memory. Needs the packages
of `pip install peftax[aot]` and `ptxas`, of CUDA or of the wheel nvidia-cuda-nvcc. Compiled is not run: nothing here
tells how fast a kernel is.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import importlib
import itertools
import os
import re
import shutil
import site
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the CUDA plugin compiles; it finds no driver to run with

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from peftax import machines
from peftax.ops.qtensor import QTensor

KERNELS = {"a100_80gb": ("triton",), "h100": ("triton", "mosaic_gpu")}
SHAPES = (  # K, N of the linears of Llama-3.1-8B and of the 70B
    *((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
    *((8192, 8192), (8192, 28672), (28672, 8192)),
)
GROUPS = {"nf4": 64, "fp4": 64, "int4": 128, "q4_0": 32, "q4_1": 32}
ROWS = {"triton": (1, 32, 8192), "mosaic_gpu": (8192,)}  # decoding; training


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel: x [m, K] @ w [K, N], or with `transposed` [m, N] @ wᵀ."""

    gpu: str
    kernel: str
    fmt: str
    k: int
    n: int
    m: int
    transposed: bool

    def __str__(self) -> str:
        way = "dx" if self.transposed else "product"
        return f"{self.gpu} {self.kernel} {self.fmt} {self.k}x{self.n} M={self.m} {way}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled kernel takes. `temporaries`: bytes that XLA keeps around it in the GPU's memory."""

    registers: int
    spilled: int
    temporaries: int
    matrix: str  # the instruction that multiplies


def ptxas() -> str | None:
    """Where CUDA's assembler is, or None."""
    wheels = [p for s in site.getsitepackages() for p in glob.glob(f"{s}/nvidia/*/bin/ptxas")]
    return wheels[0] if wheels else shutil.which("ptxas")


def cases() -> Iterator[Case]:
    """The whole matrix: NF4 in every shape, the other formats in one."""
    for gpu, kernels in KERNELS.items():
        for kernel, fmt in itertools.product(kernels, GROUPS):
            shapes = SHAPES if fmt == "nf4" else ((4096, 14336),)
            for (k, n), m, transposed in itertools.product(shapes, ROWS[kernel], (False, True)):
                yield Case(gpu, kernel, fmt, k, n, m, transposed)


def compile(case: Case) -> Report:
    """Compile one kernel in bf16, with f32 scales, to machine code."""
    at = SingleDeviceSharding(machines.gpu(case.gpu)[0])

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=at)

    k, n = case.k, case.n
    scale = array((k // GROUPS[case.fmt], 1, n), jnp.float32)
    low = scale if case.fmt == "q4_1" else None
    w = QTensor(array((k // 2, n), jnp.uint8), scale, low, fmt=case.fmt, dtype=jnp.dtype("bfloat16"))
    x = array((case.m, n if case.transposed else k), jnp.bfloat16)
    product = importlib.import_module(f"peftax.ops.kernels.{case.kernel}").product
    step = jax.jit(lambda x, w: product(x, w, transposed=case.transposed))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
        try:
            lowered = step.trace(x, w).lower(lowering_platforms=("cuda",))
            compiled = lowered.compile({**machines.CUDA_OPTIONS, "xla_dump_to": folder})
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"], os.environ["MOSAIC_GPU_DUMP_PTXAS"]
        name = f"{case.fmt}_{'dx' if case.transposed else 'product'}"
        ptx, log = _assembled(Path(folder), name)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if len(spills) != 2 or len(registers) != 1:
        raise RuntimeError(f"{case}: ptxas does not say what one kernel takes: {log}")
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    matrix = next((i for i in ("wgmma", "mma.sync") if re.search(rf"\b{re.escape(i)}", ptx)), "none")
    return Report(int(registers[0]), sum(map(int, spills)), temporaries, matrix)


def _assembled(folder: Path, name: str) -> tuple[str, str]:
    """PTX of the kernel, and what ptxas says of it. Mosaic calls it by itself; for XLA's PTX we do."""
    for path in sorted(folder.rglob("*.ptx")):
        text = path.read_text()
        if not re.search(rf"\.entry {name}(_mosaic_gpu_kernel)?\(", text):
            continue
        said = path.with_suffix(".ptxas")
        if said.is_file():
            return text, said.read_text()
        (target,) = re.findall(r"^\.target (sm_\w+)", text, re.MULTILINE)
        command = [ptxas() or "ptxas", "-v", f"-arch={target}", str(path), "-o", str(path.with_suffix(".cubin"))]
        return text, subprocess.run(command, check=True, capture_output=True, text=True).stderr
    raise RuntimeError(f"no PTX holds the kernel {name}")


def table(reports: dict[Case, Report]) -> str:
    """Markdown."""
    lines = [
        "| GPU | kernel | format | K | N | M | | registers | spilled, B | instruction | temporaries, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c, r in reports.items():
        way = "dx" if c.transposed else "product"
        lines.append(
            f"| {c.gpu} | {c.kernel} | {c.fmt} | {c.k} | {c.n} | {c.m} | {way} | {r.registers} | {r.spilled} "
            f"| {r.matrix} | {r.temporaries / 2**20:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--only", default="", help="words, separated by commas, that a case's name must all hold")
    args = parser.parse_args()
    if why := machines.missing("cuda"):
        raise SystemExit(f"experiments.kernels.gpu: {why}")
    if ptxas() is None:
        raise SystemExit("experiments.kernels.gpu: no ptxas; install CUDA or pip install nvidia-cuda-nvcc")
    words = [w for w in args.only.split(",") if w]
    chosen = [c for c in cases() if all(w in str(c).split() for w in words)]
    if not chosen:
        raise SystemExit(f"experiments.kernels.gpu: --only={args.only} names no case; e.g. {next(cases())}")
    reports = {}
    for case in chosen:
        reports[case] = compile(case)
        print(case, reports[case], flush=True)
    spilled = [str(c) for c, r in reports.items() if r.spilled]
    version = subprocess.run([ptxas() or "ptxas", "--version"], capture_output=True, text=True).stdout
    (release,) = re.findall(r"release ([\d.]+)", version)
    args.out.write_text(
        "# The GPU kernels of a packed weight, compiled\n\n"
        f"Made by `python -m experiments.kernels.gpu --out={args.out}` with JAX {jax.__version__} and ptxas {release}, "
        "without a GPU: nothing here was run or timed. x in bf16, scales in f32. Temporaries are what XLA keeps in the "
        "GPU's memory around the kernel: partial sums where few rows split the contracted axis (triton), and x or y "
        "with its columns in another order (mosaic_gpu); never a dense weight.\n\n"
        f"{len(reports)} kernels, {len(spilled)} with spilled registers.\n\n{table(reports)}\n"
    )


if __name__ == "__main__":
    main()
