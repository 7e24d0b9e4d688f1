"""The GPU kernels of a packed weight compile for an A100 and an H100 that are not here, and stay in their registers."""

import pytest

from experiments.kernels import gpu
from experiments.kernels.gpu import Case
from peftax import machines
from peftax.ops.kernels import triton

pytestmark = pytest.mark.aot

CASES = {  # of gpu.cases(): each GPU, kernel, way and format; 8B and 70B; decoding and training
    Case("a100_80gb", "triton", "nf4", 4096, 14336, 8192, False): "mma.sync",
    Case("a100_80gb", "triton", "nf4", 14336, 4096, 8192, True): "mma.sync",
    Case("a100_80gb", "triton", "nf4", 8192, 28672, 1, False): "mma.sync",
    Case("a100_80gb", "triton", "q4_1", 4096, 14336, 32, True): "mma.sync",
    Case("h100", "triton", "nf4", 8192, 8192, 8192, False): "wgmma",
    Case("h100", "triton", "fp4", 4096, 14336, 8192, True): "wgmma",
    Case("h100", "triton", "int4", 4096, 14336, 32, False): "mma.sync",
    Case("h100", "mosaic_gpu", "nf4", 4096, 4096, 8192, False): "wgmma",
    Case("h100", "mosaic_gpu", "nf4", 8192, 28672, 8192, True): "wgmma",
    Case("h100", "mosaic_gpu", "q4_0", 4096, 14336, 8192, False): "wgmma",
    Case("h100", "mosaic_gpu", "q4_1", 4096, 14336, 8192, True): "wgmma",
}


@pytest.fixture(autouse=True, scope="module")
def compilers():
    if why := machines.missing("cuda"):
        pytest.skip(why)
    if gpu.ptxas() is None:
        pytest.skip("no ptxas: install CUDA or pip install nvidia-cuda-nvcc")


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case).replace(" ", "-"))
def test_kernel_compiles_without_spills_and_without_a_dense_weight(case):
    report = gpu.compile(case)
    assert report.spilled == 0
    assert 32 < report.registers <= 255
    assert report.matrix == CASES[case]
    if case.kernel == "mosaic_gpu":  # one array with its columns in another order, x or y
        allowed = 2 * case.m * case.k
    elif case.m > 64:
        allowed = 0
    else:  # x with 16 rows at least, and f32 sums of parts of the contracted axis
        allowed = case.k * case.n // 4
    assert report.temporaries <= allowed


def test_spills_are_seen(monkeypatch):
    wide = triton.Tiles(m=256, out=128, inner=64, splits=1, warps=4, stages=2)
    monkeypatch.setattr(triton, "tiles", lambda *_: wide)
    assert gpu.compile(Case("a100_80gb", "triton", "nf4", 4096, 4096, 8192, False)).spilled > 0


def test_the_matrix_holds_the_sample():
    assert set(CASES) <= set(gpu.cases())
