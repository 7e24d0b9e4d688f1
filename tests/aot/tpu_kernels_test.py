"""The TPU kernels compile for every generation at the shapes of Llama-3.1, and leave no dense weight in HBM."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from peftax import machines
from peftax.ops.kernels import tpu
from peftax.ops.qtensor import LEVELS, QTensor

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(machines.missing("tpu") is not None, reason=str(machines.missing("tpu"))),
]

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}

CASES = [  # chip, format, rows of scales to one, M, K, N, dx
    ("v5e", "nf4", 64, 2048, 4096, 14336, False),  # Llama-3.1-8B
    ("v5e", "nf4", 64, 2048, 4096, 1024, True),
    ("v5e", "int4", 128, 16, 14336, 4096, False),
    ("v5p", "nf4", 64, 2048, 8192, 28672, True),  # 70B
    ("v5p", "q4_1", 32, 300, 4096, 4096, False),
    ("v5p", "fp4", 64, 1, 28672, 8192, False),
    ("v6e", "nf4", 64, 2048, 14336, 4096, False),
    ("v6e", "nf4", 4096, 16, 4096, 4096, True),
    ("v6e", "int8", 8192, 2048, 8192, 8192, True),
    ("tpu7x", "nf4", 64, 8192, 28672, 8192, False),
    ("tpu7x", "q4_0", 32, 2048, 4096, 4096, True),
    ("tpu7x", "q8_0", 32, 16, 4096, 14336, False),
]


def abstract_weight(fmt, k, n, group, place):
    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    packed = array((k, n), jnp.int8) if LEVELS[fmt] is None else array((k // 2, n), jnp.uint8)
    scale = array((k // group, 1, n), jnp.float32)
    return QTensor(packed, scale, scale if fmt == "q4_1" else None, fmt=fmt)


def compile_product(chip, fmt, group, m, k, n, transposed, dtype="bfloat16"):
    place = SingleDeviceSharding(machines.tpu(CHIPS[chip])[0])
    w = abstract_weight(fmt, k, n, group, place)
    x = jax.ShapeDtypeStruct((m, n if transposed else k), dtype, sharding=place)
    tiles = tpu.choose(m, w, dtype, transposed=transposed, kind=chip)
    step = jax.jit(lambda x, w: tpu.product(x, w, transposed=transposed, tiles=tiles))
    return machines.compile(step, x, w)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_compiles_without_a_dense_weight(case):
    _, _, _, m, k, n, _ = case
    compiled = compile_product(*case)
    assert compiled.as_text().count("tpu_custom_call") == 1
    ragged = 2 * (k + n) * (m + 16) if m % 16 else 0  # x and y with their last rows filled up
    assert machines.memory(compiled)["temporaries"] <= ragged + (1 << 20)  # the weight: 4 to 235 million numbers


def test_double_quantization_expands_scales_only():
    """They are found by gathers outside the kernel: an f32 to 64 numbers, and what the gathers take."""
    k = n = 4096
    place = SingleDeviceSharding(machines.tpu(CHIPS["v6e"])[0])
    w = abstract_weight("nf4", k, n, 64, place)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    w = dataclasses.replace(
        w,
        scale=array(w.scale.shape, jnp.uint8),
        nested=array((k * n // 64 // 256,), jnp.float32),
        offset=array((), jnp.float32),
    )
    tiles = tpu.choose(2048, w, "bfloat16", transposed=False, kind="v6e")
    compiled = machines.compile(jax.jit(lambda x, w: tpu.product(x, w, tiles=tiles)), array((2048, k), jnp.bfloat16), w)
    assert machines.memory(compiled)["temporaries"] <= 4 * k * n // 64


@pytest.mark.parametrize("transposed", [False, True])
def test_width_of_no_whole_registers(transposed):
    compile_product("v5e", "nf4", 64, 256, 576, 1536, transposed)  # SmolLM2-135M's


def test_a_generation_that_cannot_compile_it_is_refused(monkeypatch):
    """TPU v4 has no gather along sublanes; dispatch takes XLA there."""
    device = machines.tpu("v4:2x2x1")[0]
    place = SingleDeviceSharding(device)
    w, x = abstract_weight("nf4", 4096, 4096, 64, place), jax.ShapeDtypeStruct((16, 4096), "bfloat16", sharding=place)
    tiles = tpu.choose(16, w, "bfloat16", transposed=False, kind=tpu.SMALLEST)
    with pytest.raises(Exception, match="Sublane gather not supported by this TPU generation"):
        machines.compile(jax.jit(lambda x, w: tpu.product(x, w, tiles=tiles)), x, w)
    monkeypatch.setattr(tpu, "_device_kind", lambda: device.device_kind)
    assert "TPU v4" in tpu.supports(w, 16, "bfloat16", transposed=False)


def test_float32_compiles():
    compiled = compile_product("v6e", "nf4", 64, 256, 4096, 1024, False, dtype="float32")
    assert machines.memory(compiled)["temporaries"] <= 1 << 20
