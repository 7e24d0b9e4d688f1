"""The planner for machines that are not here, by its command."""

import json

import pytest

from peftax import cli, machines
from peftax.weights.outlines import KNOWN
from tests.machines.cost_test import closed_formula

pytestmark = pytest.mark.aot


def planned(capsys, *given):
    assert cli.main(["plan", "--json", "--programs", "step", *given]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.skipif(machines.missing("cuda") is not None, reason=str(machines.missing("cuda")))
def test_a_gpu(capsys):
    found = planned(
        capsys,
        *("--config=llama3_8b_qlora", "--topology=a100-80gb:1", "--config.data.length=1024"),
        *("--config.train.batch_size=1", "--config.train.accumulate=1", "--tokens", "5120000", "--price=2"),
    )
    config = KNOWN["meta-llama/Llama-3.1-8B"]
    wanted = closed_formula(config, rows=1, length=1024, rank=16, remat=True)
    step = found["programs"]["step"]
    assert abs(step["flops"] - wanted) < 0.02 * wanted
    assert found["trainable"] == 41_943_040
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    plain = 2 * (2 * 128256 * 4096 + (2 * 32 + 1) * 4096)
    assert abs(found["kinds"]["base"] - linear * 4.127 / 8 - plain) < 1e-3 * found["kinds"]["base"]
    assert found["fits"] and found["peak"] == max(p["bytes"] for p in found["programs"].values())
    assert step["bounds"]["compute"] == pytest.approx(step["flops"] / 3.12e14)
    assert step["traffic"] > 3 * linear * 4.127 / 8  # forward, again, back
    half = found["epoch"]["50%"]
    assert half["cost"] == 2 * half["device_hours"] == pytest.approx(step["flops"] * 5000 / 1.56e14 / 1800)


@pytest.mark.skipif(machines.missing("tpu") is not None, reason=str(machines.missing("tpu")))
def test_a_slice(capsys):
    found = planned(
        capsys,
        *("--config=llama3_8b_qlora", "--topology=v5e-4", "--config.model.path=meta-llama/Llama-3.2-1B"),
        *("--config.data.length=512", "--config.train.batch_size=4", "--config.train.accumulate=1"),
    )
    config = KNOWN["meta-llama/Llama-3.2-1B"]
    wanted = closed_formula(config, rows=4, length=512, rank=16, remat=True)
    assert abs(found["programs"]["step"]["flops"] - wanted) < 0.02 * wanted
    packed = 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192) * 4.127 / 8
    gathered = found["programs"]["step"]["messages"]["all-gather"]
    assert 2 * packed * 3 / 4 < gathered < 5 * packed  # packed bytes, in each pass; never numbers of two bytes
