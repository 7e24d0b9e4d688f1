import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import tree
from peftax.methods.vera import vera
from tests.methods import hand, tiny


def test_by_hand():
    """xA = [1, 2] [[1, 0], [1, 1]] = [3, 2]; ⊙ d = [3, 4]; B: [3, 4, 7]; ⊙ b: [3, 0, 14] on [6, 5, 2]."""
    y, kernel, _ = hand.outcome(
        vera(rank=2, targets=["layers_0"]),
        {"d": jnp.array([1.0, 2.0]), "b": jnp.array([1.0, 0.0, 2.0])},
        shared={"down": jnp.array([[1.0, 0.0], [1.0, 1.0]]), "up": jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])},
    )
    assert y == [[9.0, 5.0, 16.0]]
    assert kernel == [[2.0, 0.0, 3.0], [3.0, 2.0, 6.0]]  # W + [[1, 0, 2], [1, 0, 6]]


def test_projections_are_as_wide_as_the_widest_site_and_stand_once():
    method = vera(rank=3, targets=["q_proj", "down_proj"])
    frozen, trainable = method.init(jax.random.key(0), tiny.params(), tiny.found())
    shared = frozen["vera"]["default"]
    assert {k: v.shape for k, v in shared.items()} == {"down": (41, 3), "up": (3, 40)}  # down_proj's in, q_proj's out
    names = {p.rsplit("/", 1)[1] for p in tree.flatten(trainable)}
    assert names == {"d", "b"}


def test_projections_follow_the_seed_not_the_key():
    def down(key, seed):
        method = vera(rank=3, seed=seed, targets=["q_proj"])
        return np.asarray(method.init(jax.random.key(key), tiny.params(), tiny.found())[0]["vera"]["default"]["down"])

    np.testing.assert_array_equal(down(0, 7), down(1, 7))
    assert not np.array_equal(down(0, 7), down(0, 8))
    assert np.abs(down(0, 7)).max() <= np.sqrt(6 / 24)


def test_rank_is_checked():
    with pytest.raises(ValueError, match="rank 0"):
        vera(rank=0)
