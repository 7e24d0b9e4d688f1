"""The TPU kernel's cost on paper stays what experiments/kernels/tpu.md says, and within its bars."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftax import machines

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(machines.missing("tpu") is not None, reason=str(machines.missing("tpu"))),
]

ROOT = Path(__file__).parents[2]
OF_BF16 = {"v5e": 1.10, "v6e": 1.20}  # NF4, 2048 rows, 4096 x 4096


def rows(file):
    """{(chip, weight, way, M, K, N): (thousands of bundles, cost over the bf16 kernel's)}"""
    found = {}
    for line in file.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in OF_BF16:
            found[tuple(cells[:6])] = float(cells[7]), float(cells[11])
    return found


def test_bundles_and_bars(tmp_path):
    """In a process of its own: libtpu reads where to write schedules as it is loaded."""
    words = ["--out", str(tmp_path / "tpu.md"), "--kinds=v5e,v6e", "--formats=nf4", "--sizes=2048"]
    command = [sys.executable, "-m", "experiments.kernels.static_cost", *words]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    committed, made = rows(ROOT / "experiments/kernels/tpu.md"), rows(tmp_path / "tpu.md")
    assert len(made) == 4  # two chips, forward and dx
    for kernel, (bundles, of_bf16) in made.items():
        assert bundles == pytest.approx(committed[kernel][0], rel=0.1), kernel
        assert of_bf16 <= OF_BF16[kernel[0]], kernel
