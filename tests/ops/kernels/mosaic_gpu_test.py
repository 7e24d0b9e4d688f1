"""The Mosaic GPU kernel in Pallas' GPU interpreter (threads, copies and barriers, but no register layouts)."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.ops import qtensor
from peftax.ops.kernels import mosaic_gpu
from peftax.ops.qtensor import QTensor
from tests.ops.packed import weight

GROUPS = {"nf4": 64, "fp4": 128, "int4": 32, "q4_0": 32, "q4_1": 32}
K, N = 256, 128


def rows(m, wide, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(5).normal(size=(m, wide)), dtype)


def check(x, w, transposed=False):
    """The kernel gives x @ dense(w), up to the last rounding and the order of f32 sums."""
    numbers = qtensor.dense(w.astype(x.dtype)).astype(jnp.float32)
    wanted = x.astype(jnp.float32) @ (numbers.T if transposed else numbers)
    y = jax.jit(lambda x, w: mosaic_gpu.product(x, w, transposed=transposed, interpret=True))(x, w)
    assert y.dtype == x.dtype
    half = float(jnp.finfo(x.dtype).eps) / 2
    np.testing.assert_allclose(
        y.astype(jnp.float32), wanted, rtol=1.01 * half, atol=2e-5 * float(jnp.abs(wanted).max())
    )


@pytest.mark.parametrize("fmt", mosaic_gpu.FORMATS)
def test_product_and_dx_of_every_format(fmt):
    check(rows(128, K), weight(fmt, K, N, group=GROUPS[fmt]))
    check(rows(128, N), weight(fmt, K, N, group=GROUPS[fmt]), transposed=True)


def test_unpacked_numbers_are_those_of_dense():
    """Bit for bit: with the identity for x, every sum has one term."""
    w = weight("nf4", 128, N, group=64)
    y = mosaic_gpu.product(jnp.eye(128, dtype=jnp.bfloat16), w, interpret=True)
    np.testing.assert_array_equal(y, qtensor.dense(w.astype(jnp.bfloat16)))


def test_whole_numbers_are_exact():
    """int4 with scales of a power of two and whole x: no product or sum rounds."""
    w = weight("int4", 128, N)
    w = dataclasses.replace(w, scale=jnp.full_like(w.scale, 0.5))
    x = jnp.asarray(np.random.default_rng(4).integers(-1, 2, (128, 128)), jnp.float16)
    for transposed in (False, True):
        numbers = np.asarray(qtensor.dense(w), np.float32)
        y = mosaic_gpu.product(x, w, transposed=transposed, interpret=True)
        np.testing.assert_array_equal(y, np.asarray(x, np.float32) @ (numbers.T if transposed else numbers))


def test_ragged_rows_and_many_tiles():
    w = weight("int4", K, 256, group=64)
    check(rows(130, K), w)
    check(rows(130, 256), w, transposed=True)


def test_float16_and_a_group_over_many_tiles():
    check(rows(65, K, jnp.float16), weight("q4_0", K, N, group=256))
    check(rows(65, N, jnp.float16), weight("q4_0", K, N, group=256), transposed=True)


@pytest.mark.parametrize("weights", [1, 2])
def test_vmap_over_rows_and_over_weights(weights):
    w = weight("int4", 128, 128, lead=(weights,))
    x = rows(2 * 128, 128).reshape(2, 128, 128)
    over = jax.tree.map(lambda a: a[0], w) if weights == 1 else w
    mapped = (0, None) if weights == 1 else (0, 0)
    y = jax.vmap(lambda x, w: mosaic_gpu.product(x, w, interpret=True), mapped)(x, over)
    wanted = x.astype(jnp.float32) @ qtensor.dense(w.astype(x.dtype)).astype(jnp.float32)
    np.testing.assert_allclose(y.astype(jnp.float32), wanted, rtol=1e-2, atol=1e-3)


def test_other_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability="8.0")])
    assert "compute capability 8.0" in mosaic_gpu.supports(weight("nf4", K, N), 128, jnp.bfloat16, transposed=False)


def test_dx_is_the_gradient_of_the_product():
    w, x, dy = weight("int4", K, N, group=32), rows(128, K), rows(128, N)
    _, backward = jax.vjp(lambda x: x @ qtensor.dense(w.astype(x.dtype)), x)
    (wanted,) = backward(dy)
    got = mosaic_gpu.product(dy, w, transposed=True, interpret=True)
    np.testing.assert_allclose(got.astype(jnp.float32), wanted.astype(jnp.float32), rtol=1e-2, atol=0.05)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "w, m, dtype, why",
    [
        (weight("nf4", 96, N, group=32), 128, jnp.bfloat16, "K=96"),
        (weight("nf4", K, 96, group=64), 128, jnp.bfloat16, "N=96"),
        (weight("nf4", K, N, group=16), 128, jnp.bfloat16, "groups of 16 rows"),
        (weight("nf4", 384, N, group=96), 128, jnp.bfloat16, "groups of 96 rows"),
        (weight("nf4", K, N, group=64), 128, jnp.float32, "x is float32; want bfloat16 or float16"),
        (weight("nf4", K, N, group=64), 32, jnp.bfloat16, "M=32"),
        (QTensor(jnp.ones((64, 128), jnp.int8), jnp.ones((1, 1, 128)), fmt="int8"), 128, jnp.bfloat16, "format 'int8'"),
        (QTensor(jnp.ones((2, 64, 128), jnp.uint8), jnp.ones((2, 2, 1, 128))), 128, jnp.bfloat16, "3 axes"),
    ],
)
def test_what_it_refuses_it_names(w, m, dtype, why, transposed):
    assert why in mosaic_gpu.supports(w, m, dtype, transposed=transposed)
    with pytest.raises(ValueError, match=f"mosaic_gpu.product: .*{why}"):
        mosaic_gpu.product(jnp.ones((m, w.shape[-1 if transposed else -2]), dtype), w, transposed=transposed)


def test_a_wrong_width_is_named():
    with pytest.raises(ValueError, match="does not contract"):
        mosaic_gpu.product(rows(128, N), weight("nf4", K, N, group=64))
