import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import injection, sites, tree
from peftax.core.method import Ctx
from peftax.methods.compacter import compacter
from tests.methods import llama_3b, tiny

SMALL = {"size": 8}
TOY = {"size": 3, "n": 1, "a_std": 1.0}


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        return 2.0 * nn.Dense(2, use_bias=False, name="mix")(x), "as it was"


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Twice(name="twice")(x)[0]


def outcome(method, x, leaves):
    params = {"twice": {"mix": {"kernel": jnp.eye(2)}}}
    flat = tree.flatten(tree.merge(*method.init(jax.random.key(0), params, sites.find(Model().apply, params, x))))
    for path, value in leaves.items():
        assert flat[path].shape == value.shape, path
        flat[path] = value
    return injection.inject(Model().apply, method)({"params": tree.unflatten(flat)}, x)


def test_by_hand():
    """f([1, 2]) = [2, 4]; n = 2, so that the right factors are numbers: S_i T_i = 1·1 and 2·1.

    D = A_1 + 2 A_2 = [[1, 1], [0, 2]] + 2 [[0, 1], [1, 0]] = [[1, 3], [2, 2]]: [2, 4] D = [10, 14], + d = [0, -20],
    relu: [10, 0]; U = 3 A_1 + 0 A_2: [30, 30]; + u = [1, 2]: y = [2, 4] + [31, 32].
    """
    at = "twice/compacter/default"
    leaves = {
        "compacter/default/a": jnp.array([[[1.0, 1.0], [0.0, 2.0]], [[0.0, 1.0], [1.0, 0.0]]]),
        f"{at}/down_s": jnp.array([[[1.0]], [[2.0]]]),
        f"{at}/down_t": jnp.ones((2, 1, 1)),
        f"{at}/up_s": jnp.ones((2, 1, 1)),
        f"{at}/up_t": jnp.array([[[3.0]], [[0.0]]]),
        f"{at}/down_bias": jnp.array([0.0, -20.0]),
        f"{at}/up_bias": jnp.array([1.0, 2.0]),
    }
    method = compacter(size=2, n=2, targets=["twice"], activation="relu")
    assert outcome(method, jnp.array([[1.0, 2.0]]), leaves).tolist() == [[33.0, 36.0]]


def test_a_matrix_is_the_sum_of_kronecker_products():
    """Of rank 2 and unlike sizes, beside numpy's kron."""
    rng = np.random.default_rng(0)
    method = compacter(size=4, n=2, rank=2, targets=["mlp"], activation="tanh")
    part = method.init(jax.random.key(0), tiny.params(), tiny.found())
    flat = {p: 0.5 * rng.normal(size=x.shape) for p, x in tree.flatten(part.trainable).items()}
    a = flat["compacter/default/a"] = rng.normal(size=(2, 2, 2))
    own = {leaf: flat[f"model/layers/mlp/compacter/default/{leaf}"][1] for leaf in ("down_s", "down_t", "up_s", "up_t")}
    down, up = (sum(np.kron(a[i], own[f"{w}_s"][i] @ own[f"{w}_t"][i]) for i in range(2)) for w in ("down", "up"))
    theta = {**own, "a": a, "down_bias": np.zeros(4), "up_bias": np.zeros(24)}
    theta = {leaf: jnp.asarray(x, jnp.float32) for leaf, x in theta.items()}
    x = jnp.asarray(rng.normal(size=(3, 24)), jnp.float32)
    y = method.call({"default": theta}, lambda x: x, (x,), Ctx(), "mlp")
    np.testing.assert_allclose(y - x, np.tanh(np.asarray(x) @ down) @ up, atol=1e-5)


def test_counts():
    """Two adapters in each of 28 layers: 2 (3072 + 24) + 3072 + 24 each, and A once."""
    counted = sites.count(compacter(size=24, n=4), *llama_3b.found())
    assert counted["trainable"] == 28 * 2 * 3 * (3072 + 24) + 4**3


def test_errors():
    with pytest.raises(ValueError, match="compacter: n 4 must divide size 22; the nearest size is 24"):
        compacter(size=22)
    with pytest.raises(ValueError, match="compacter: n 5 must divide the width 24 of 'model/layers/self_attn'; .* 1"):
        compacter(n=5, size=5).init(jax.random.key(0), tiny.params(), tiny.found())
    assert compacter().fold is None
