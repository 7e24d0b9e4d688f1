"""The product of a packed weight: numbers, gradient, batching, mesh; the weight is read once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from peftax import sharding
from peftax.ops import quantized
from peftax.ops.product import matmul
from peftax.ops.qtensor import LEVELS, dense
from tests.ops import packed


def close(a, b, tolerance=5e-6):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("fmt", LEVELS)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3)])
def test_equals_the_dense_product(fmt, lead):
    w = packed.weight(fmt, 64, 24)
    x = jax.random.normal(jax.random.key(0), (*lead, 64))

    def through(product):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(product(x))))(x)

    ours, plain = jax.jit(lambda: through(lambda x: matmul(x, w)))(), through(lambda x: x @ dense(w))
    jax.tree.map(lambda a, b: close(a, b, 3e-5), ours, plain)


def test_bfloat16_rounds_the_weight_once():
    w = packed.weight("nf4", 64, 24)
    x = jax.random.normal(jax.random.key(0), (4, 64), jnp.bfloat16)
    y = matmul(x, w.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, x @ dense(w).astype(jnp.bfloat16))


def test_a_wrong_contraction_is_named():
    with pytest.raises(ValueError, match=r"x \(3, 32\) does not contract with w \(64, 24\)"):
        matmul(jnp.ones((3, 32)), packed.weight("nf4", 64, 24))


def products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from products(inner)


def test_members_share_one_reading():
    """vmap over x, forward and backward: products of [members x rows], no batched weight."""
    w = packed.weight("nf4", 64, 24)
    x = jax.random.normal(jax.random.key(0), (3, 5, 64))

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(matmul(x, w))))(x)

    close(jax.vmap(gradient)(x), jnp.stack([gradient(row) for row in x]))
    dots = list(products(jax.make_jaxpr(jax.vmap(gradient))(x).jaxpr))
    assert len(dots) == 2
    for dot in dots:
        assert dot.params["dimension_numbers"][1] == ((), ())  # no batch axes
        assert dot.invars[0].aval.shape[0] == 15
    program = jax.jit(jax.vmap(gradient)).lower(x).compile().as_text()
    assert "[64,24]" in program and "[3,64,24]" not in program and "[3,32,24]" not in program


def test_weights_mapped_too():
    w = packed.weight("int4", 64, 24, lead=(3,))
    x = jax.random.normal(jax.random.key(0), (3, 5, 64))
    close(jax.vmap(matmul)(x, w), jnp.einsum("ebk,ekn->ebn", x, dense(w)))
    close(jax.vmap(matmul, (None, 0))(x[0], w), jnp.einsum("bk,ekn->ebn", x[0], dense(w)))
    dx = jax.vmap(jax.grad(lambda x, w: jnp.sum(matmul(x, w) ** 2)))(x, w)
    close(dx, jax.vmap(jax.grad(lambda x, w: jnp.sum((x @ dense(w)) ** 2)))(x, w), 1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_slices_it(remat):
    w = packed.weight("nf4", 32, 32, lead=(4,))
    x = jax.random.normal(jax.random.key(0), (5, 32))

    def loss(x, layers):
        step = lambda x, w: (jnp.tanh(matmul(x, w)), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(jax.checkpoint(step) if remat else step, x, layers)[0])

    def plain(x):
        for layer in dense(w):
            x = jnp.tanh(x @ layer)
        return jnp.sum(x)

    jax.tree.map(close, jax.jit(jax.value_and_grad(loss))(x, w), jax.value_and_grad(plain)(x))


def test_on_a_mesh_packed_bytes_move():
    """Rows over eight devices, the weight split over them: what is gathered is uint8."""
    mesh = sharding.make_mesh(data=2, fsdp=4)
    w = packed.weight("nf4", 64, 32)
    x = jax.random.normal(jax.random.key(0), (16, 6, 64))
    rows = NamedSharding(mesh, sharding.BATCH)

    def loss(x, w):
        return jnp.sum(jnp.sin(quantized.product(x, dataclasses.replace(w, rows=rows))))

    lies = sharding.of_leaf(w, PartitionSpec("fsdp", None), mesh)
    placed = jax.tree.map(jax.device_put, w, lies)
    step = jax.jit(jax.value_and_grad(loss)).lower(jax.device_put(x, rows), placed).compile()
    value, dx = step(jax.device_put(x, rows), placed)
    plain, dx_plain = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(x @ dense(w))))(x)
    close(value, plain, 1e-5)
    close(dx, dx_plain)
    gathers = [line for line in step.as_text().splitlines() if " all-gather(" in line or "all-gather-start(" in line]
    assert gathers and not [line for line in gathers if "[64,32]" in line and "u8" not in line], gathers
