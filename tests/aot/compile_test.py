"""The LoRA step of a Llama compiles for a TPU and for GPUs that are not here, and its memory is known."""

import jax
import pytest
from jax.experimental import serialize_executable

from peftax import machines
from peftax.core import tree
from tests.aot import programs

pytestmark = pytest.mark.aot

CONFIG = programs.LLAMA_1B
BATCH, LENGTH, CHUNK = 8, 1024, programs.CHUNK
WORKSPACE = 32 << 20  # cublasLt's on an H100; XLA counts it as a temporary

# name: platform, its devices, the size of the data axis, a mark of the compiler in the program
CASES = {
    "v5e-4": ("tpu", lambda: machines.tpu("v5e:2x2"), 2, b"TPU v5 lite"),
    "a100-1": ("cuda", lambda: machines.gpu("a100_80gb"), 1, b"sm_80"),
    "h100-8": ("cuda", lambda: machines.gpu("h100", count=8), 2, b"sm_90"),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    platform, devices_of, data, mark = CASES[request.param]
    if why := machines.missing(platform):
        pytest.skip(why)
    devices = devices_of()
    step, args = programs.Program(devices, mesh={"data": data}).train()
    return platform, devices, args, mark, machines.compile(step, *args)


def test_targets_the_machine(case):
    platform, devices, _, mark, compiled = case
    text = compiled.as_text()
    code = serialize_executable.serialize(compiled)[0]
    assert mark in code
    if platform == "tpu":
        assert "T(8,128)" in text  # tiled layouts are the TPU's
    else:
        assert "__cublas$lt" in text
        assert b"\x7fELF" in code  # machine code, not only PTX
    gathers = "all-gather" in text
    assert gathers == (len(devices) > 1)


def test_memory(case):
    platform, devices, args, _, compiled = case
    memory = machines.memory(compiled)
    unused = [x for path, x in tree.flatten(args[1]).items() if path.endswith("/id")]  # without dropout
    expected = machines.shard_bytes(args) - machines.shard_bytes(unused)
    leaves = len(jax.tree.leaves(args))
    padding = 512 * leaves if platform == "tpu" else 0  # a scalar takes a tile
    assert expected <= memory["arguments"] <= expected + padding

    # theta and its optimizer state are given back in place; besides them only the metrics come out
    returned = machines.shard_bytes(args[0])
    assert memory["aliases"] >= returned
    assert memory["outputs"] - memory["aliases"] <= 4096

    # kept for the backward pass: each layer's input in bf16; while working: one layer's attention scores and
    # gates in f32, the logits of one chunk, and on a mesh the gathered kernels of one layer
    rows = BATCH // len(devices)
    kept = 2 * CONFIG["num_hidden_layers"] * rows * LENGTH * CONFIG["hidden_size"]
    scores = 4 * rows * CONFIG["num_attention_heads"] * LENGTH * LENGTH
    gates = 4 * rows * LENGTH * CONFIG["intermediate_size"]
    logits = 4 * rows * CHUNK * CONFIG["vocab_size"]
    stacks = [x for path, x in tree.flatten(args[1]).items() if path.endswith("/kernel")]
    gathered = sum(x.size * x.dtype.itemsize for x in stacks) // CONFIG["num_hidden_layers"] if len(devices) > 1 else 0
    assert memory["temporaries"] <= kept + 3 * scores + 3 * gates + 3 * logits + gathered + WORKSPACE
    assert memory["bytes"] >= memory["arguments"] + kept


def test_no_whole_stack_in_float32(case):
    *_, (_, frozen, _), _, compiled = case
    text = compiled.as_text()
    kernels = {p: x for p, x in tree.flatten(frozen).items() if p.endswith("/kernel")}
    assert kernels
    for kernel in kernels.values():
        for shape in (kernel.shape, kernel.sharding.shard_shape(kernel.shape)):
            assert f"f32[{','.join(map(str, shape))}]" not in text


def test_no_logits_of_all_tokens(case):
    _, devices, _, _, compiled = case
    rows, vocab = BATCH // len(devices), CONFIG["vocab_size"]
    for shape in (f"{rows},{LENGTH},{vocab}", f"{rows * LENGTH},{vocab}", f"{BATCH},{LENGTH},{vocab}"):
        assert f"[{shape}]" not in compiled.as_text()


def test_unknown_gpu_names_the_known():
    with pytest.raises(ValueError, match="known: a100_40gb, a100_80gb, b200, h100, h200"):
        machines.gpu("h1000")
