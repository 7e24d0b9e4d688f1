"""Attention against jax's own, and the mask's words one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from peftax.ops.attention import Where, attention, visible, xla


def random_where(seed, b, t, s):
    """Segments in no order, padding and common ones among them; the first key is seen by all."""
    rng = np.random.default_rng(seed)

    def of(n):
        return rng.integers(0, 2 * s, (b, n)), rng.integers(-1, 3, (b, n))

    (q_pos, q_seg), (k_pos, k_seg) = of(t), of(s)
    k_pos[:, 0], k_seg[:, 0] = 0, -1
    return Where(*(jnp.asarray(x, jnp.int32) for x in (q_pos, q_seg, k_pos, k_seg)))


def one_segment(t, s, b=1):
    positions, ones = jnp.arange(s)[None].repeat(b, 0), jnp.ones((b, s), jnp.int32)
    return Where(positions[:, s - t :], ones[:, s - t :], positions, ones)


def arrays(seed, b, t, s, heads, kv, size=8):
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (b, t, heads, size))
    return q, *(jax.random.normal(key, (b, kv, s, size)) for key in keys[1:])


def with_slopes(f, *args):
    return jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1, 2))(*args)


def equal(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


def with_mask(mask):
    """jax's own, of any mask [B, T, S]."""
    return lambda q, k, v: jax.nn.dot_product_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask=mask[:, None])


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


@pytest.mark.parametrize(("heads", "kv", "window"), [(4, 4, None), (6, 2, 9), (3, 1, jnp.int32(9))])
def test_equals_jax(heads, kv, window):
    given, where = arrays(0, 2, 5, 7, heads, kv), random_where(0, 2, 5, 7)
    where = Where(where.q_positions % 9, where.q_segments, where.k_positions, where.k_segments)
    ours = with_slopes(lambda *a: attention(*a, where, window=window), *given)
    equal(ours, with_slopes(with_mask(visible(where, window)), *given))


@pytest.mark.parametrize(("t", "s", "block"), [(5, 5, 2), (6, 9, 4), (20, 20, 1), (3, 3, 64)])
def test_blocks_equal_the_whole(t, s, block):
    """Queries in blocks of any size, keys of a prefix in front, more blocks than four."""
    given, where = arrays(1, 2, t, s, 4, 2), random_where(1, 2, t, s)
    causal = np.tril(np.ones((1, t, s), bool), s - t)
    ours = with_slopes(lambda *a: xla.attention(*a, where, in_order=True, block=block), *given)
    equal(ours, with_slopes(with_mask(visible(where) & causal), *given))


@pytest.mark.parametrize(("t", "in_order"), [(80, True), (150, True), (32, False), (37, False)])
def test_few_queries_at_a_time(t, in_order):
    """Long rows: scans over 16 queries, with and without a rest, of blocks and of the whole."""
    s = t + 3
    given, where = arrays(2, 1, t, s, 2, 1), random_where(2, 1, t, s)
    causal = np.tril(np.ones((1, t, s), bool), s - t) if in_order else True
    ours = with_slopes(lambda *a: xla.attention(*a, where, in_order=in_order, scores=1), *given)
    equal(ours, with_slopes(with_mask(visible(where) & causal), *given))


def shapes_of(jaxpr):
    for equation in jaxpr.eqns:
        yield from (x.aval for x in equation.outvars)
        for inner in jex.jaxprs_in_params(equation.params):
            yield from shapes_of(inner)


def test_no_mask_of_a_long_row():
    """Of 4096 tokens neither the scores nor the mask exist for more queries than the bytes of their scores allow."""
    q, k = jnp.ones((1, 4096, 2, 4)), jnp.ones((1, 1, 4096, 4))

    def slopes(q, k):
        return jax.grad(lambda q, k: attention(q, k, k, one_segment(4096, 4096), in_order=True).sum(), (0, 1))(q, k)

    largest = max(x.size for x in shapes_of(jax.make_jaxpr(slopes)(q, k).jaxpr))
    assert largest == xla.SCORES // 4  # of 2^23 scores, an eighth of 2 x 4096 x 4096


def test_nothing_square_is_kept():
    """Of 256 queries and keys the backward pass keeps q, k, v, y and two numbers a query."""
    q = jnp.ones((1, 256, 2, 4))
    k = jnp.ones((1, 2, 256, 4))
    _, back = jax.vjp(lambda q, k: attention(q, k, k, one_segment(256, 256), in_order=True), q, k)
    assert max(x.size for x in jax.tree.leaves(back)) == q.size


def test_a_row_that_sees_nothing_is_finite():
    q, k = jnp.ones((1, 2, 1, 4), jnp.bfloat16), jnp.ones((1, 1, 2, 4), jnp.bfloat16)
    y = attention(q, k, k, Where(*(jnp.zeros((1, 2), jnp.int32),) * 4))
    assert y.dtype == jnp.bfloat16 and bool(jnp.isfinite(y).all())


def test_shapes_that_do_not_belong_together():
    q, k = jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 2, 4))
    with pytest.raises(ValueError, match=r"wants k and v \[1, heads that divide 3, keys, 4\]"):
        attention(q, k, k, one_segment(2, 2))
    with pytest.raises(ValueError, match="2 queries and 2 keys, but `where` holds 2 and 3"):
        attention(q[:, :, :2], k, k, one_segment(2, 3))
