"""Whole models on a base in few bits: packed bytes are what lies and what moves, and they are read once."""

import dataclasses
import math
import re
from collections.abc import Callable

import jax
import pytest

from peftax import machines
from peftax.core import tree
from tests.aot.programs import LLAMA_8B, LLAMA_70B, LLAMA_405B, NF4, Program

pytestmark = pytest.mark.aot
INT4 = (("_proj/kernel$", {"fmt": "int4", "group": 128}),)
BITS = {"nf4": 4.127, "int4": 4.25}


@dataclasses.dataclass(frozen=True)
class Case:
    """What to compile, and the memory of one device, GiB, that it must fit."""

    platform: str
    devices: Callable[[], list[jax.Device]]
    memory: int
    make: Callable[[Program], tuple]
    program: dict


def tpu(name, memory, make, **program):
    return Case("tpu", lambda: machines.tpu(name), memory, make, program)


def gpu(name, count, make, **program):
    return Case("cuda", lambda: machines.gpu(name, count), 80, make, program)


TRAIN, EVALUATE, DECODE = Program.train, Program.evaluate, Program.decode
ONE, EIGHT = {"batch": 1, "length": 640}, {"batch": 8, "length": 640}  # no number of rows is a width of a weight
PROMPTS = {"batch": 16, "length": 128}
TWO_BY_TWO, FOUR_BY_FOUR = {"fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 4}
CASES = {
    "8B-v5e-1": tpu("v5e:1x1", 16, TRAIN, config=LLAMA_8B, rules=NF4, **ONE),
    "8B-v6e-1-decode": tpu("v6e:1x1", 32, DECODE, config=LLAMA_8B, rules=NF4, **PROMPTS),
    "70B-v5p-4": tpu("v5p:2x2x1", 95, TRAIN, config=LLAMA_70B, rules=NF4, mesh=TWO_BY_TWO, batch=2, length=640),
    "70B-v5e-16": tpu("v5e:4x4", 16, TRAIN, config=LLAMA_70B, rules=NF4, mesh=FOUR_BY_FOUR, batch=4, length=640),
    "70B-v6e-16": tpu("v6e:4x4", 32, TRAIN, config=LLAMA_70B, rules=NF4, mesh={"fsdp": 16}, batch=16, length=640),
    "405B-v5p-32": tpu(  # in clouds' names v5p-64: these count cores, two a chip
        "v5p:4x4x2", 95, TRAIN, config=LLAMA_405B, rules=NF4, mesh={"fsdp": 8, "tensor": 4}, batch=8, length=640
    ),
    "70B-tpu7x-2-decode": tpu(
        "tpu7x:1x1x1", 96, DECODE, config=LLAMA_70B, rules=NF4, mesh={"fsdp": 1, "tensor": 2}, **PROMPTS
    ),
    "8B-a100-1-int4-decode": gpu("a100_80gb", 1, DECODE, config=LLAMA_8B, rules=INT4, **PROMPTS),
    "70B-a100-1": gpu("a100_80gb", 1, TRAIN, config=LLAMA_70B, rules=NF4, **ONE),
    "8B-h100-1-evaluate": gpu("h100", 1, EVALUATE, config=LLAMA_8B, rules=NF4, **ONE),
    "70B-h100-8": gpu("h100", 8, TRAIN, config=LLAMA_70B, rules=NF4, mesh={"fsdp": 2, "tensor": 4}, **EIGHT),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, least_effort):
    """(the case, its packed weights with their places, its arguments, the compiled program)"""
    case = CASES[request.param]
    if why := machines.missing(case.platform):
        pytest.skip(why)
    step, args = case.make(Program(case.devices(), **case.program))
    compiled = machines.compile(step, *args)
    packed = [x for x in jax.tree.leaves(args, is_leaf=tree.is_packed) if tree.is_packed(x)]
    yield case, packed, args, compiled, compiled.as_text()
    jax.clear_caches()  # of programs of this size not many are to be held at a time


def test_bits_and_memory(case):
    case, packed, args, compiled, _ = case
    weights = sum(x.size for x in packed)
    assert len(packed) == 7
    assert abs(8 * tree.nbytes(packed) / weights - BITS[packed[0].fmt]) < 0.001
    memory = machines.memory(compiled)
    assert memory["arguments"] <= 1.001 * machines.shard_bytes(args) + (1 << 20)  # with padding
    assert memory["bytes"] < case.memory << 30
    # beside what a 16-bit base would take by itself there is no room for one
    assert memory["temporaries"] < 2 * weights // _weight_parts(packed)


def test_weights_lie_in_equal_parts(case):
    """A device holds its share of the base and no more: total / devices within 2%."""
    case, packed, args, _, _ = case
    devices = len(packed[0].packed.sharding.device_set)
    base = [x for path, x in tree.flatten(args[1] if case.make is TRAIN else args[0]).items() if "/lora/" not in path]
    assert 1 <= machines.shard_bytes(base) * devices / tree.nbytes(base) < 1.02


def _weight_parts(packed):
    """Over how many devices the weights are split."""
    return round(sum(x.size for x in packed) / (2 * machines.shard_bytes([x.packed for x in packed])))


def shapes(x):
    """The shapes in which numbers of one layer of a weight may stand, whole or of one device's part."""
    part = x.packed.sharding.shard_shape(x.packed.shape)
    for half, n in ((x.packed.shape[-2], x.shape[-1]), part[-2:]):
        k = 2 * half
        for shape in ((k, n), (n, k), (half, 2, n), (k // x.group, x.group, n)):
            yield ",".join(map(str, shape))


def test_no_numbers_of_a_weight(case):
    """Of a whole stack nowhere; of one layer not on a TPU, where the kernel makes them tile by tile."""
    case, packed, _, _, text = case
    for x in packed:
        layers = x.shape[0]
        for shape in shapes(x):
            for lead in (f"{layers},", *(("1,", "") if case.platform == "tpu" else ())):
                assert not re.search(rf"(f32|bf16)\[{lead}{shape}\]", text), (lead, shape)
    if case.platform == "tpu":
        assert "tpu_custom_call" in text


def collectives(text):
    """(what it does, dtype, sizes) of every array that moves between devices."""
    for line in text.splitlines():
        if found := re.search(
            r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(-start)?\(", line
        ):
            for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", line[: found.start()]):
                yield found[1], dtype, [int(n) for n in sizes.split(",") if n]


def test_packed_bytes_move(case):
    """Over `fsdp` a weight is gathered in bytes; over `tensor` it does not move; nowhere do its numbers."""
    case, packed, _, _, text = case
    mesh = packed[0].packed.sharding.mesh if len(case.devices()) > 1 else None
    moving = list(collectives(text))
    if mesh is None:
        assert not moving
        return
    forbidden = {tuple(map(int, shape.split(","))) for x in packed for shape in shapes(x)}
    for _, dtype, sizes in moving:
        assert dtype == "u8" or tuple(n for n in sizes if n > 1) not in forbidden, (dtype, sizes)
    gathered = {math.prod(sizes) for kind, dtype, sizes in moving if (kind, dtype) == ("all-gather", "u8")}
    for x in packed:
        one = math.prod(x.packed.shape[1:]) // mesh.shape["tensor"]
        assert (one in gathered) == (mesh.shape["fsdp"] > 1), (x.shape, gathered)


def test_members_read_each_weight_once(least_effort):
    """A population of four adapters on one base: as many products as one adapter takes, each of all members' rows."""
    if why := machines.missing("tpu"):
        pytest.skip(why)
    program = Program(machines.tpu("v5e:1x1"), config=LLAMA_8B, rules=NF4, batch=1, length=512)
    step, args = program.population(4)
    compiled = machines.compile(step, *args)
    assert machines.memory(compiled)["bytes"] < 16 << 30
    calls = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    made = [re.search(r"nf4_(product|dx)", line)[1] for line in calls]
    assert made.count("dx") == 7
    assert 7 <= made.count("product") <= 14  # remat makes them a second time
    for line in calls:
        result, operands = line.split(" custom-call(")
        assert re.search(r"bf16\[2048,\d+\]", result), result  # 4 members of 512 rows
        assert len(re.findall(r"u8\[\d+,\d+\]", operands)) == 1
    packed = [x for x in jax.tree.leaves(args, is_leaf=tree.is_packed) if tree.is_packed(x)]
    for x in packed:  # no copy of it has an axis of members
        assert not re.search(rf"u8\[(\d+,)*4,(\d+,)?{x.packed.shape[-2]},{x.shape[-1]}\]", compiled.as_text())
