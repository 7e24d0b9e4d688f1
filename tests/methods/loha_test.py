import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core.method import Ctx, Kernel
from peftax.methods.loha import loha
from tests.methods import hand, llama_3b

SMALL = {"rank": 2}


def test_by_hand():
    """[1, 2]ᵀ [1, 1, 2] ⊙ [1, 1]ᵀ [2, 0, 1] = [[2, 0, 2], [4, 0, 4]]; s = 2; x times it: 2 [10, 0, 10] on [6, 5, 2]."""
    leaves = {
        "a1": jnp.array([[1.0], [2.0]]),
        "b1": jnp.array([[1.0, 1.0, 2.0]]),
        "a2": jnp.array([[1.0], [1.0]]),
        "b2": jnp.array([[2.0, 0.0, 1.0]]),
    }
    y, kernel, bias = hand.outcome(loha(rank=1, alpha=2.0, targets=["layers_0"]), leaves)
    assert y == [[26.0, 5.0, 22.0]]
    assert kernel == [[5.0, 0.0, 5.0], [10.0, 2.0, 8.0]]
    assert bias == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("rank", [2, 8])
def test_both_ways_to_multiply_are_the_folded_kernel(rank):
    """At rank 2 by pairs of ranks, at rank 8 by the update itself."""
    rng = np.random.default_rng(0)
    shapes = {"a1": (20, rank), "b1": (rank, 30), "a2": (20, rank), "b2": (rank, 30), "scale": ()}
    theta = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    x, part = jnp.asarray(rng.normal(size=(3, 20)), jnp.float32), loha(rank=rank).parts[0]

    def call(theta, x):
        return part.call({"default": theta}, x, Kernel(jnp.zeros((20, 30))), Ctx(), "")

    update = theta["scale"] * (theta["a1"] @ theta["b1"]) * (theta["a2"] @ theta["b2"])
    np.testing.assert_allclose(call(theta, x), x @ update, rtol=1e-4, atol=1e-4)
    program = str(jax.make_jaxpr(jax.grad(lambda t: call(t, x).sum()))(theta))
    assert ("f32[20,30] = dot_general" in program) == (rank == 8)


def outputs(**settings):
    """The update alone, of ones, for 200 keys: [keys, out]."""
    theta = {"a1": jnp.ones((3, 1)), "b1": jnp.ones((1, 8)), "a2": jnp.ones((3, 1)), "b2": jnp.ones((1, 8))}
    theta |= {"scale": jnp.float32(1.0), "id": jnp.int32(0)}
    call = loha(rank=1, **settings).parts[0].call

    def one(key):
        return call({"default": theta}, jnp.ones((1, 3)), Kernel(jnp.zeros((3, 8))), Ctx(key=key), "q")[0]

    return np.asarray(jax.vmap(one)(jax.random.split(jax.random.key(0), 200))) / 3


def test_dropout_takes_outputs_and_keeps_their_mean():
    y = outputs(dropout=0.5)
    assert 0.4 < (y == 0).mean() < 0.6
    some = y.any(1)
    np.testing.assert_allclose(y[some].mean(1), 1.0, rtol=1e-5)


def test_module_dropout_takes_the_whole_update():
    y = outputs(module_dropout=0.25)
    assert set(np.unique(y)) == {0.0, 1.0} and ((y == 0).all(1) | (y == 1).all(1)).all()
    assert 0.15 < (y == 0).mean() < 0.35


def test_counts_are_those_of_pefts_run():
    config = {"peft_type": "LOHA", "r": 32, "target_modules": ["q_proj", "v_proj"]}
    assert llama_3b.count(config)["trainable"] == 18_350_080


def test_settings_are_checked():
    with pytest.raises(ValueError, match="loha: rank 0 must be at least 1"):
        loha(rank=0)
    with pytest.raises(ValueError, match="loha: module_dropout 1.0"):
        loha(module_dropout=1.0)
