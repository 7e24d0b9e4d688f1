"""The product and its narrow form: values, gradients, batching, errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.ops.product import linear, matmul, narrow


def test_rows_and_products():
    w = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(matmul(jnp.array([[2, 0]]), w), [[[4, 5], [0, 1]]])
    np.testing.assert_array_equal(matmul(jnp.ones((1, 2, 3)), w), [[[6, 9], [6, 9]]])
    np.testing.assert_array_equal(linear(jnp.ones((1, 3)), w, jnp.array([1.0, -1.0])), [[7, 8]])
    with pytest.raises(ValueError, match="does not contract"):
        matmul(jnp.ones((2, 4)), w)


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (5, 5)])
def test_narrow_is_the_plain_product(shape):
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (2, 7, shape[0])), jax.random.normal(keys[1], shape)
    c = jax.random.normal(keys[2], (2, 7, shape[1]))

    def through(f):
        return jax.value_and_grad(lambda x, w: jnp.sum(f(x, w) * c), (0, 1))(x, w)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), through(narrow), through(matmul))


def test_narrow_under_vmap_and_remat():
    x, w = jnp.ones((4, 2, 6)), jnp.arange(4 * 6 * 3.0).reshape(4, 6, 3)
    one = jax.vmap(jax.grad(lambda w, x: jnp.sum(jax.checkpoint(narrow)(x, w) ** 2)))(w, x)
    two = jax.vmap(jax.grad(lambda w, x: jnp.sum(matmul(x, w) ** 2)))(w, x)
    np.testing.assert_allclose(one, two, rtol=1e-6)


def test_bf16_sums_in_f32_and_so_do_its_slopes():
    """XLA for CPU multiplies bf16 at the speed of f32 unless the sum is f32."""
    x = jax.random.normal(jax.random.key(0), (3, 8, 64)).astype(jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (64, 5)).astype(jnp.bfloat16)
    c = jax.random.normal(jax.random.key(2), (3, 8, 5)).astype(jnp.bfloat16)

    def through(f):
        return jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(f(x, w).astype(jnp.float32) * c), (0, 1)))

    exact = through(jnp.matmul)(*(v.astype(jnp.float32) for v in (x, w)))
    for f in (matmul, narrow):
        value, slopes = through(f)(x, w)
        assert [s.dtype for s in slopes] == [jnp.bfloat16] * 2
        np.testing.assert_allclose(value, exact[0], rtol=1e-2)
        for ours, theirs in zip(slopes, exact[1], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(jnp.abs(theirs).max()))
        products = [line for line in through(f).lower(x, w).as_text().splitlines() if "stablehlo.dot_general" in line]
        assert len(products) == 3
        for line in products:
            assert re.search(r"\(tensor<\w+xbf16>, tensor<\w+xbf16>\) -> tensor<\w+xf32>", line), line
