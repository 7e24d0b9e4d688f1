import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import injection, tree
from peftax.core.method import Ctx
from peftax.methods.p_tuning import p_tuning
from tests.methods import llama_3b, tiny

SMALL = {"length": 7}
AT = "model/embed_tokens/p_tuning/default"
TOKENS = jnp.array([[7, 1, 30, 4]])


def start(method):
    return method.init(jax.random.key(0), tiny.params(), tiny.found())


def logits_of(rows):
    """The base's logits of TOKENS behind these rows."""
    method = p_tuning(length=len(rows), encoder="none")
    params = tree.unflatten({**tree.flatten(tiny.params()), f"{AT}/p": jnp.asarray(rows, jnp.float32)})
    return injection.inject(tiny.model().apply, method)({"params": params}, TOKENS)


def logits(method, **leaves):
    flat = tree.flatten(tree.merge(*start(method)))
    for leaf, value in leaves.items():
        assert flat[f"{AT}/{leaf}"].shape == value.shape, leaf
        flat[f"{AT}/{leaf}"] = value
    return injection.inject(tiny.model().apply, method)({"params": tree.unflatten(flat)}, TOKENS)


def first(*shape):
    """A matrix that passes the first number on, to the first place."""
    return jnp.zeros(shape).at[(0,) * len(shape)].set(1.0)


def test_mlp_by_hand():
    """e = [2, 0, ...] -> relu(2·1 - 5) = 0, relu(0 + 3) = 3 -> 3·1 + 0.5 = 3.5, all other numbers 0.5."""
    ours = logits(
        p_tuning(length=1, size=2),
        e=jnp.zeros((1, 24)).at[0, 0].set(2.0),
        w0=first(24, 2),
        c0=jnp.array([-5.0, 0.0]),
        w1=first(2, 2),
        c1=jnp.array([3.0, 0.0]),
        w2=first(2, 24),
        c2=jnp.full((24,), 0.5),
    )
    np.testing.assert_allclose(ours, logits_of([[3.5] + [0.5] * 23]), atol=1e-5)


def test_lstm_by_hand():
    """One state, open gates (σ(50) = 1), g = tanh(x): forward c = tanh 1, then tanh 1 + tanh 2; h = tanh c.

    Backward it begins at the second row. The head adds both ways' states.
    """
    x = np.zeros((2, 24, 4), np.float32)
    x[:, 0, 2] = 1.0  # only g reads the row
    b = np.zeros((2, 2, 4), np.float32)
    b[:, 0, [0, 1, 3]] = 25.0  # of i, f and o: 25 in each of two biases
    b[:, 1, [0, 1, 3]] = 25.0
    ours = logits(
        p_tuning(length=2, encoder="lstm", size=1, lstm_layers=1),
        e=jnp.zeros((2, 24)).at[:, 0].set(jnp.array([1.0, 2.0])),
        x0=jnp.asarray(x),
        h0=jnp.zeros((2, 1, 4)),
        b0=jnp.asarray(b),
        w0=jnp.array([[1.0, 0.0], [1.0, 0.0]]),
        c0=jnp.zeros(2),
        w1=first(2, 24),
        c1=jnp.zeros(24),
    )
    both = np.tanh(np.tanh(1) + np.tanh(2))
    rows = np.zeros((2, 24))
    rows[:, 0] = [np.tanh(np.tanh(1)) + both, both + np.tanh(np.tanh(2))]
    np.testing.assert_allclose(ours, logits_of(rows), atol=1e-5)


def test_dropout_between_the_lstms_layers():
    method = p_tuning(length=3, encoder="lstm", size=4, encoder_dropout=0.5)
    params = tree.merge(*start(method))
    apply = jax.jit(injection.inject(tiny.model().apply, method))
    plain = apply({"params": params}, TOKENS)
    some = [apply({"params": params}, TOKENS, ctx=Ctx(key=jax.random.key(seed))) for seed in (0, 1)]
    assert tiny.distance(some[0], some[1]) > 1e-3 and tiny.distance(some[0], plain) > 1e-3


def test_counts_are_those_of_pefts_run():
    config = {"peft_type": "P_TUNING", "num_virtual_tokens": 20, "encoder_hidden_size": 3072, "encoder_dropout": 0.0}
    assert llama_3b.count(config) == {"trainable": 28_382_208, "total": 3_241_132_032}


def test_settings_are_checked():
    with pytest.raises(ValueError, match="p_tuning: encoder 'gru' is none of 'mlp', 'lstm', 'none'"):
        p_tuning(encoder="gru")
    with pytest.raises(ValueError, match="p_tuning: size 0 must be at least 1"):
        p_tuning(size=0)
