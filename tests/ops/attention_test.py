"""Attention against jax's own, and the mask's words one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.ops.attention import Where, attention, visible


def test_visible():
    positions = jnp.array([[0, 1, 2, 0, 1, 0]])
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])
    seen = visible(Where(positions, segments, positions, segments))[0].astype(int)
    np.testing.assert_array_equal(
        seen,
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0] * 6],
    )
    windowed = visible(Where(positions, segments, positions, segments), 2)[0].astype(int)
    np.testing.assert_array_equal(windowed[2], [0, 1, 1, 0, 0, 0])


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (6, 2), (3, 1)])
def test_equals_jax(heads, kv):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 5, heads, 8))
    k, v = (jax.random.normal(key, (2, kv, 7, 8)) for key in keys[1:3])
    mask = jax.random.bernoulli(keys[3], 0.6, (2, 5, 7)).at[:, :, 0].set(True)

    def through(f):
        return jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1, 2))(q, k, v)

    ours = through(lambda q, k, v: attention(q, k, v, mask))

    def whole(q, k, v):
        return jax.nn.dot_product_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask=mask[:, None])

    theirs = through(whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


@pytest.mark.parametrize(("t", "s", "block"), [(5, 5, 2), (6, 9, 4), (20, 20, 1), (3, 3, 64)])
def test_blocks_equal_the_whole(t, s, block):
    """Queries in blocks of any size, keys of a prefix in front, more blocks than four."""
    keys = jax.random.split(jax.random.key(1), 4)
    q, k, v = (jax.random.normal(keys[0], (2, t, 4, 8)), *(jax.random.normal(key, (2, 2, s, 8)) for key in keys[1:3]))
    mask = jax.random.bernoulli(keys[3], 0.6, (2, t, s)).at[:, :, 0].set(True)
    causal = np.tril(np.ones((1, t, s), bool), s - t)

    def through(mask, **how):
        return jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(attention(*a, mask, **how))), (0, 1, 2))(q, k, v)

    ours, whole = through(mask, in_order=True, block=block), through(mask & causal)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, whole)


def test_nothing_square_is_kept():
    """Of 256 queries and keys the backward pass keeps q, k, v, y and two numbers a query."""
    q = jnp.ones((1, 256, 2, 4))
    k = jnp.ones((1, 2, 256, 4))
    mask = jnp.ones((1, 256, 256), bool)
    _, back = jax.vjp(lambda q, k: attention(q, k, k, mask, in_order=True), q, k)
    assert max(x.size for x in jax.tree.leaves(back) if x.dtype != bool) == q.size


def test_a_row_that_sees_nothing_is_finite():
    q, k = jnp.ones((1, 2, 1, 4), jnp.bfloat16), jnp.ones((1, 1, 2, 4), jnp.bfloat16)
    y = attention(q, k, k, jnp.zeros((1, 2, 2), bool))
    assert y.dtype == jnp.bfloat16 and bool(jnp.isfinite(y).all())
