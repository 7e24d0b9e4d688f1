"""The Triton kernel, interpreted: the numbers of x @ dense(w), forward and backward, in every format."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.ops import qtensor
from peftax.ops.kernels import triton
from peftax.ops.qtensor import QTensor
from tests.ops.packed import weight

GROUPS = {"nf4": 64, "fp4": 128, "int4": 32, "q4_0": 32, "q4_1": 32}
K, N = 256, 64


def rows(m, wide, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(5).normal(size=(m, wide)), dtype)


def expected(x, w, transposed=False):
    """f32 [M, N], from the numbers that the kernel is to multiply: dense(w) in the dtype of x."""
    numbers = qtensor.dense(w.astype(x.dtype)).astype(jnp.float32)
    return x.astype(jnp.float32) @ (numbers.T if transposed else numbers)


def assert_rounded(y, wanted):
    """Equal but for the last rounding, to the dtype of y, and the order of f32 sums."""
    assert y.shape == wanted.shape
    half = float(jnp.finfo(y.dtype).eps) / 2
    np.testing.assert_allclose(
        y.astype(jnp.float32), wanted, rtol=1.01 * half, atol=2e-5 * float(jnp.abs(wanted).max())
    )


@pytest.mark.parametrize("fmt", triton.FORMATS)
def test_product_and_dx_of_every_format(fmt):
    w = weight(fmt, K, N, group=GROUPS[fmt])
    for transposed, wide in ((False, K), (True, N)):
        x = rows(128, wide)
        assert_rounded(triton.product(x, w, transposed=transposed, interpret=True), expected(x, w, transposed))


@pytest.mark.parametrize("fmt", [fmt for fmt in triton.FORMATS if fmt != "q4_1"])
def test_unpacked_numbers_are_those_of_dense(fmt):
    """Bit for bit: with the identity for x, every sum has one term. (Not q4_1, which a CPU rounds once for product and
    sum together.)
    """
    w = weight(fmt, 128, N, group=32)
    y = triton.product(jnp.eye(128, dtype=jnp.bfloat16), w, interpret=True)
    np.testing.assert_array_equal(y, qtensor.dense(w.astype(jnp.bfloat16)))


@pytest.mark.parametrize("transposed", [False, True])
def test_whole_numbers_are_exact(transposed):
    """int4 with scales of powers of two and whole x: no product or sum rounds, y least of all."""
    w = weight("int4", 64, 64)
    w = dataclasses.replace(w, scale=jnp.full_like(w.scale, 0.5))
    x = jnp.asarray(np.random.default_rng(4).integers(-1, 2, (16, 64)), jnp.float16)
    y = triton.product(x, w, transposed=transposed, interpret=True)
    numbers = np.asarray(qtensor.dense(w))
    np.testing.assert_array_equal(
        y.astype(jnp.float32), np.asarray(x, np.float32) @ (numbers.T if transposed else numbers)
    )


@pytest.mark.parametrize("m", [1, 17, 130])
def test_ragged_rows(m):
    w = weight("nf4", K, N, group=64)
    for transposed, wide in ((False, K), (True, N)):
        x = rows(m, wide)
        assert_rounded(triton.product(x, w, transposed=transposed, interpret=True), expected(x, w, transposed))


@pytest.mark.parametrize("group", [32, 96, 768])
def test_groups_of_any_multiple_of_32_rows(group):
    w = weight("int4", 768, 64, group=group)
    for transposed, wide in ((False, 768), (True, 64)):
        x = rows(16, wide)
        assert_rounded(triton.product(x, w, transposed=transposed, interpret=True), expected(x, w, transposed))


def test_float16():
    w, x = weight("nf4", K, N, group=64), rows(32, K, jnp.float16)
    y = triton.product(x, w, interpret=True)
    assert y.dtype == jnp.float16
    assert_rounded(y, expected(x, w))


def test_dx_is_the_gradient_of_the_product():
    w, x, dy = weight("nf4", K, N, group=64), rows(32, K), rows(32, N)
    _, backward = jax.vjp(lambda x: x @ qtensor.dense(w.astype(x.dtype)).astype(x.dtype), x)
    (wanted,) = backward(dy)
    got = triton.product(dy, w, transposed=True, interpret=True)
    np.testing.assert_allclose(got.astype(jnp.float32), wanted.astype(jnp.float32), rtol=1e-2, atol=0.05)


def test_double_quantized_scales():
    rng = np.random.default_rng(7)
    blocks = K // 64 * N
    w = weight("nf4", K, N, group=64)
    double = QTensor(
        w.packed,
        jnp.asarray(rng.integers(0, 256, (K // 64, 1, N)), jnp.uint8),
        nested=jnp.asarray(rng.uniform(0.1, 0.2, -(-blocks // qtensor.NESTED)), jnp.float32),
        offset=jnp.float32(0.5),
    )
    x = rows(16, K)
    assert_rounded(triton.product(x, double, interpret=True), expected(x, double))


def test_few_rows_split_the_contracted_axis():
    w = weight("nf4", 1024, 64, group=64)
    assert triton.tiles(1, w, False).splits == 4
    assert triton.tiles(2048, w, False).splits == 1
    x = rows(1, 1024)
    assert_rounded(triton.product(x, w, interpret=True), expected(x, w))


def test_vmap_over_weights():
    w = weight("nf4", 128, 64, group=64, lead=(2,))
    x = rows(2 * 16, 128).reshape(2, 16, 128)
    y = jax.vmap(lambda x, w: triton.product(x, w, interpret=True))(x, w)
    for i in range(2):
        assert_rounded(y[i], expected(x[i], jax.tree.map(lambda a, i=i: a[i], w)))


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability="7.5")])
    assert "compute capability 7.5" in triton.supports(weight("nf4", K, N), 8, jnp.bfloat16, transposed=False)


def test_every_row_tile_is_made_once():
    m_tiles, out_tiles = 11, 3  # bands of 8 and of 3
    places = {tuple(map(int, triton._place(jnp.int32(p), m_tiles, out_tiles))) for p in range(m_tiles * out_tiles)}
    assert places == {(i, j) for i in range(m_tiles) for j in range(out_tiles)}


def test_the_cost_counts_packed_bytes():
    w, x = weight("nf4", K, N, group=64), rows(128, K)
    (call,) = [
        e
        for e in jax.make_jaxpr(lambda x: triton._call(x, w, triton.tiles(128, w, False), False, True))(x).eqns
        if e.primitive.name == "pallas_call"
    ]
    cost = call.params["cost_estimate"]
    assert cost.flops == 2 * 128 * K * N
    assert cost.bytes_accessed == 2 * 128 * K + K * N // 2 + 4 * K * N // 64 + 2 * 32 + 2 * 128 * N


@pytest.mark.parametrize(
    "w, dtype, why",
    [
        (weight("nf4", 48, N, group=16), jnp.bfloat16, "K=48"),
        (weight("nf4", K, 40, group=64), jnp.bfloat16, "N=40"),
        (weight("nf4", K, N, group=16), jnp.bfloat16, "groups of 16 rows"),
        (weight("nf4", K, N, group=64), jnp.float32, "x is float32; want bfloat16 or float16"),
        (QTensor(jnp.ones((64, 64), jnp.int8), jnp.ones((1, 1, 64)), fmt="int8"), jnp.bfloat16, "format 'int8'"),
        (QTensor(jnp.ones((2, 32, 64), jnp.uint8), jnp.ones((2, 1, 1, 64))), jnp.bfloat16, "3 axes"),
    ],
)
def test_what_it_refuses_it_names(w, dtype, why):
    assert why in triton.supports(w, 8, dtype, transposed=False)
    with pytest.raises(ValueError, match=f"triton.product: .*{why}"):
        triton.product(jnp.ones((8, w.shape[-2]), dtype), w, interpret=True)


def test_a_wrong_width_is_named():
    with pytest.raises(ValueError, match="does not contract"):
        triton.product(rows(8, N), weight("nf4", K, N, group=64), interpret=True)
