"""The TPU kernels, interpreted: they make the product of the dense weight both ways, for every format and shape."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from peftax.ops.kernels import tpu
from peftax.ops.qtensor import LEVELS, dense
from tests.ops.packed import weight

SMALL = tpu.Tiles(16, 128, 128)


def inputs(m, width, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(1).normal(size=(m, width)), dtype)


def assert_is_product(y, x, w, transposed):
    """Of the weight rounded to the dtype of x: up to the order of f32 sums and one rounding of y."""
    x64, numbers = np.asarray(x, np.float64), np.asarray(dense(w.astype(x.dtype)), np.float64)
    numbers = numbers.T if transposed else numbers
    exact = x64 @ numbers
    assert y.dtype == x.dtype and y.shape == exact.shape
    rounding = {"bfloat16": 2.0**-8, "float32": 2.0**-23}[x.dtype.name]
    error = np.abs(np.asarray(y, np.float64) - exact)
    np.testing.assert_array_less(error, rounding * np.abs(exact) + 1e-6 * np.abs(x64) @ np.abs(numbers))


@pytest.mark.parametrize("fmt", sorted(LEVELS))
def test_dx_of_every_format(fmt):
    w = weight(fmt, 256, 256)
    x = inputs(32, 256)
    assert_is_product(tpu.product(x, w, transposed=True, tiles=SMALL, interpret=True), x, w, True)


@pytest.mark.parametrize(
    ("fmt", "dtype"), [*((fmt, "bfloat16") for fmt in sorted(LEVELS) if fmt != "q4_1"), ("nf4", "float32")]
)
def test_unpacked_numbers_are_those_of_dense(fmt, dtype):
    """Bit for bit: with the identity for x, every sum has one term. (Not q4_1, which a CPU rounds once for product and
    sum together.)
    """
    w = weight(fmt, 128, 128)
    y = tpu.product(jnp.eye(128, dtype=dtype), w, tiles=tpu.Tiles(128, 128, 128), interpret=True)
    np.testing.assert_array_equal(y, dense(w.astype(dtype)))


@pytest.mark.parametrize("transposed", [False, True])
def test_whole_numbers_are_exact(transposed):
    """int4 with scales of powers of two and whole x: every product and sum is a number of f32."""
    w = weight("int4", 128, 128)
    w = dataclasses.replace(w, scale=2.0 ** jnp.asarray(np.random.default_rng(3).integers(-2, 3, w.scale.shape)))
    x = jnp.asarray(np.random.default_rng(4).integers(-8, 9, (16, 128)), jnp.float32)
    y = tpu.product(x, w, transposed=transposed, tiles=SMALL, interpret=True)
    np.testing.assert_array_equal(y, np.asarray(x) @ (np.asarray(dense(w)).T if transposed else np.asarray(dense(w))))


def test_dx_is_the_gradient():
    w = weight("nf4", 128, 256, group=64)
    x, dy = inputs(16, 128, "float32"), inputs(16, 256, "float32")
    (expected,) = jax.vjp(lambda x: x @ dense(w), x)[1](dy)
    dx = tpu.product(dy, w, transposed=True, tiles=SMALL, interpret=True)
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "tiles"), [(1, None), (100, None), (33, SMALL)])
def test_any_number_of_rows(m, tiles):
    w = weight("nf4", 128, 128)
    x = inputs(m, 128)
    assert_is_product(tpu.product(x, w, tiles=tiles, interpret=True), x, w, False)


@pytest.mark.parametrize(("group", "transposed"), [(64, False), (256, True), (384, False), (384, True)])
def test_groups_larger_and_smaller_than_tiles(group, transposed):
    k = 512 if group == 256 else 384
    w = weight("nf4", k, 128, group=group)
    x = inputs(16, 128 if transposed else k)
    assert_is_product(tpu.product(x, w, transposed=transposed, tiles=SMALL, interpret=True), x, w, transposed)


def test_rounds_of_rows(monkeypatch):
    """The last round has fewer tiles of rows than the others."""
    monkeypatch.setattr(tpu, "ROWS", 32)
    w = weight("nf4", 256, 128)
    x = inputs(80, 256)
    assert tpu._grid(80, w.shape, SMALL, False) == (3, 1, 2, 2)
    assert_is_product(tpu.product(x, w, tiles=SMALL, interpret=True), x, w, False)


def test_memory_that_starts_as_nan():
    w = weight("nf4", 256, 128)
    x = inputs(32, 256)
    interpret = pltpu.InterpretParams(uninitialized_memory="nan", random_seed=7)  # steps that may be parallel, shuffled
    assert_is_product(tpu.product(x, w, tiles=SMALL, interpret=interpret), x, w, False)


def test_double_quantization():
    w = weight("nf4", 512, 128, group=64)
    rng = np.random.default_rng(2)
    w = dataclasses.replace(
        w,
        scale=jnp.asarray(rng.integers(0, 256, w.scale.shape), jnp.uint8),
        nested=jnp.asarray(rng.uniform(0.01, 0.02, 4), jnp.float32),
        offset=jnp.float32(0.05),
    )
    x = inputs(16, 512)
    assert_is_product(tpu.product(x, w, tiles=SMALL, interpret=True), x, w, False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_half_precision_scales(dtype):
    w = weight("q4_1", 128, 128)
    w = dataclasses.replace(w, scale=w.scale.astype(jnp.float16), low=w.low.astype(jnp.float16))
    x = inputs(16, 128, dtype)
    assert_is_product(tpu.product(x, w, tiles=SMALL, interpret=True), x, w, False)


@pytest.mark.parametrize(
    ("w", "m", "dtype", "why"),
    [
        (weight("nf4", 128, 128, lead=(2,)), 8, "bfloat16", "3 axes"),
        (weight("nf4", 128, 128), 8, "float16", "want bfloat16 or float32"),
        (weight("nf4", 128, 192), 8, "bfloat16", "N=192; want multiples of 64 and 128"),
        (weight("nf4", 96, 128), 8, "bfloat16", "K=96"),
        (weight("nf4", 128, 128, group=16), 8, "bfloat16", "groups of 16"),
        (weight("nf4", 128, 128), 0, "bfloat16", "no rows"),
    ],
)
def test_says_what_it_does_not_take(w, m, dtype, why):
    assert why in tpu.supports(w, m, dtype, transposed=False)
    with pytest.raises(ValueError, match=why.replace(".", r"\.")):
        tpu.product(jnp.zeros((m, w.shape[-2]), dtype), w, interpret=True)


def test_tpus_that_it_was_not_compiled_for_are_refused(monkeypatch):
    w = weight("nf4", 128, 128)
    for kind, why in (("TPU v4", "device TPU v4; it was compiled for tpu7x, v5e, v5p, v6e"), ("TPU v6 lite", None)):
        monkeypatch.setattr(tpu, "_device_kind", lambda kind=kind: kind)
        assert tpu.supports(w, 8, "bfloat16", transposed=False) == why


@pytest.mark.parametrize("tiles", [tpu.Tiles(16, 96, 128), tpu.Tiles(16, 128, 256), tpu.Tiles(8, 128, 128)])
def test_refuses_tiles_that_do_not_divide(tiles):
    with pytest.raises(ValueError, match="do not divide"):
        tpu.product(inputs(8, 128), weight("nf4", 128, 128), tiles=tiles, interpret=True)


def test_refuses_another_width():
    with pytest.raises(ValueError, match="does not contract"):
        tpu.product(inputs(8, 256), weight("nf4", 128, 128), interpret=True)


@pytest.mark.parametrize("kind", sorted(tpu.TABLE))
@pytest.mark.parametrize("transposed", [False, True])
def test_chosen_tiles_divide_the_product(kind, transposed):
    for k, n in ((4096, 14336), (28672, 8192), (576, 1536), (2048, 512)):
        for group in (64, k):
            packed = jax.ShapeDtypeStruct((k // 2, n), jnp.uint8)
            scale = jax.ShapeDtypeStruct((k // group, 1, n), jnp.float32)
            w = dataclasses.replace(weight("nf4", 64, 128), packed=packed, scale=scale)
            for m in (1, 32, 300, 2048, 100_000):
                t = tpu.choose(m, w, "bfloat16", transposed=transposed, kind=kind)
                rounds, outs, inners, reuse = tpu._grid(m, w.shape, t, transposed)
                assert (outs * t.out, inners * t.inner) == ((k, n) if transposed else (n, k))
                assert t.m % 16 == 0 and (rounds - 1) * reuse * t.m < m <= rounds * reuse * t.m
                assert tpu._vmem(t, m, w, jnp.dtype("bfloat16"), transposed) <= tpu.TABLE[kind]["vmem_mib"] << 20
                assert m > 32 or t.m <= 32
