import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core.method import Ctx, Kernel
from peftax.methods.hira import hira
from tests.methods import hand, llama_3b


def call(theta, x, k, ctx=None, **settings):
    """y at one site."""
    return hira(rank=2, **settings).parts[0].call({"default": theta}, x, k, ctx or Ctx(), "")


def test_by_hand():
    """A B = [[2, 0, 1], [0, 1, 1]]; W ⊙ A B = [[2, 0, 1], [0, 2, 0]]; x times it: [2, 4, 1] on [6, 5, 2]."""
    leaves = {
        "a": jnp.array([[1.0, 0.0], [0.0, 1.0]]),
        "b": jnp.array([[2.0, 0.0, 1.0], [0.0, 1.0, 1.0]]),
    }
    y, kernel, bias = hand.outcome(hira(rank=2, targets=["layers_0"]), leaves)
    assert y == [[8.0, 9.0, 3.0]]
    assert kernel == [[3.0, 0.0, 2.0], [2.0, 4.0, 0.0]]
    assert bias == [1.0, 1.0, 1.0]


def test_an_embedding_looks_up_rows_of_the_folded_table():
    rng = np.random.default_rng(0)
    w, a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((7, 5), (7, 2), (2, 5)))
    ids = jnp.array([[3, 0, 3], [6, 1, 2]])
    y = call({"a": a, "b": b}, ids, Kernel(w, kind="embed"))
    np.testing.assert_allclose(y, (w * (1 + a @ b))[ids], rtol=1e-5, atol=1e-6)


def test_a_small_update_is_not_lost_in_bfloat16():
    """1 + 0.001 is 1 in bfloat16: the update is a product of its own."""
    w, x = jnp.ones((8, 4), jnp.bfloat16), jnp.ones((1, 8), jnp.bfloat16)
    theta = {"a": jnp.full((8, 2), 0.025), "b": jnp.full((2, 4), 0.02)}
    # 8 * 0.001 beside 8 is lost in the sum's last digit; times 1000 on one side it is seen
    y = call(theta, x, Kernel(jnp.concatenate([w[:4], -w[:4]]))).astype(jnp.float32)
    assert float(jnp.abs(y).max()) <= 1e-4
    theta["a"] = theta["a"].at[4:].set(0.0)
    y = call(theta, x, Kernel(jnp.concatenate([w[:4], -w[:4]]))).astype(jnp.float32)
    np.testing.assert_allclose(y, 0.004, rtol=1e-2)


def test_nothing_of_the_kernels_size_is_kept():
    theta = {"a": jnp.ones((50, 2)), "b": jnp.ones((2, 40))}
    w, x = jnp.ones((50, 40)), jnp.ones((7, 50))
    _, back = jax.vjp(lambda t, x: call(t, x, Kernel(w)), theta, x)
    kept = [leaf for leaf in jax.tree.leaves(back) if leaf.shape == (50, 40)]
    assert all(leaf is w or bool((leaf == w).all()) for leaf in kept)


def test_counts_are_those_of_pefts_run():
    config = {"peft_type": "HIRA", "r": 32, "target_modules": ["q_proj", "v_proj"]}
    assert llama_3b.count(config) == {"trainable": 9_175_040, "total": 3_221_924_864}


def test_rank_dropout_and_init_are_checked():
    with pytest.raises(ValueError, match="hira: rank 0 must be at least 1"):
        hira(rank=0)
    with pytest.raises(ValueError, match=r"hira: dropout 1.0 must lie in \[0, 1\)"):
        hira(dropout=1.0)
    with pytest.raises(ValueError, match="hira: init 'pissa' is none of 'kaiming', 'gaussian'"):
        hira(init="pissa")
