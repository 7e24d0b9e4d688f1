"""Pooling against the same by hand, segment by segment."""

import jax.numpy as jnp
import numpy as np
import pytest

from peftax.ops.pooling import POOLINGS, pool

SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]])
BY_HAND = {"cls": lambda h: h[0], "last": lambda h: h[-1], "mean": lambda h: h.mean(0)}


@pytest.mark.parametrize("how", POOLINGS)
def test_each_segment_has_its_own(how):
    h = np.random.default_rng(0).standard_normal((2, 6, 3)).astype(np.float32)
    pooled = np.asarray(pool(how, jnp.asarray(h), SEGMENTS))
    for row in range(2):
        for segment in (1, 2):
            own = np.asarray(SEGMENTS)[row] == segment
            np.testing.assert_allclose(pooled[row, own], np.tile(BY_HAND[how](h[row, own]), (own.sum(), 1)), rtol=1e-6)
    assert np.isfinite(pooled).all()


def test_a_mean_is_summed_in_float32():
    h = jnp.full((1, 1000, 1), 0.1, jnp.bfloat16)
    assert pool("mean", h, jnp.ones((1, 1000), jnp.int32)).dtype == jnp.bfloat16
    np.testing.assert_allclose(float(pool("mean", h, jnp.ones((1, 1000), jnp.int32))[0, 0, 0]), 0.1, rtol=5e-3)
