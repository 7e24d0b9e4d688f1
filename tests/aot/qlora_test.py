"""The same step on a base in four bits: packed bytes are what lies and what moves."""

import re

import pytest

from peftax.core import tree
from tests.aot import machines
from tests.aot.compile_test import CASES, step_for

pytestmark = pytest.mark.aot
RULES = (("_proj/kernel$", {"fmt": "nf4", "group": 64, "double": True}),)


@pytest.fixture(scope="module", params=["v5e-4", "v6e-4", "a100-1", "h100-8"])
def case(request):
    platform, devices_of, data, _ = CASES[request.param]
    if why := machines.missing(platform):
        pytest.skip(why)
    devices = devices_of()
    step, args = step_for(devices, data, RULES)
    return len(devices) // data, args, machines.compile(step, *args)


def packed(frozen):
    return [x for x in tree.flatten(frozen).values() if tree.is_packed(x)]


def test_bits(case):
    fsdp, (_, frozen, _), compiled = case
    weights = sum(x.size for x in packed(frozen))
    assert len(packed(frozen)) == 7
    assert 4.12 < 8 * tree.nbytes(packed(frozen)) / weights < 4.13
    assert machines.memory(compiled)["arguments"] < 2 * weights / fsdp  # all there is, in less than bf16 kernels take


def test_no_numbers_of_a_whole_stack(case):
    _, (_, frozen, _), compiled = case
    text = compiled.as_text()
    for x in packed(frozen):
        layers, k, n = x.shape
        for shape in ((layers, k, n), (layers, k // 2, 2, n), (layers, k // 64, 64, n)):
            assert not re.search(rf"(f32|bf16)\[{','.join(map(str, shape))}\]", text)


def test_packed_bytes_move(case):
    """On a mesh a weight is gathered as uint8; no gather gives numbers of its size."""
    fsdp, (_, frozen, _), compiled = case
    if fsdp == 1:
        pytest.skip("one device gathers nothing")
    gathers = [line for line in compiled.as_text().splitlines() if re.search(r" all-gather(-start)?\(", line)]
    for x in packed(frozen):
        k, n = x.shape[1:]
        moved = rf"\[(1,)?({k // 2},{n}|{n},{k // 2})\]"
        assert any(re.search(rf"u8{moved}", line) for line in gathers), (k, n)
        assert not any(re.search(rf"(f32|bf16)\[(1,)?({k},{n}|{n},{k})\]", line) for line in gathers), (k, n)
