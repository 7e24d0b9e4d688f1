import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from peftax.core import injection, sites, tree
from peftax.methods.adapter import adapter
from tests.core import toys
from tests.methods import tiny


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        return 2.0 * nn.Dense(2, use_bias=False, name="mix")(x), "as it was"


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        y, word = Twice(name="twice")(x)
        assert word == "as it was"
        return x + y


@pytest.mark.parametrize(
    "placement, scale, after",
    [
        ("pfeiffer", 3.0, [4.0 + 3 * (6 + 1), 8.0 + 3]),
        ("parallel", 3.0, [4.0 + 3 * (3 + 1), 8.0 + 3]),
        ("parallel", None, [4.0 + (3 + 1), 8.0 + 1]),
        ("scaled_parallel", None, [4.0 + 4 * (3 + 1), 8.0 + 4]),
    ],
)
def test_by_hand(placement, scale, after):
    """f([1, 2]) = [4, 2·1·2 = 8]... mix swaps nothing: f(x) = 2 x diag(2) = [4, 8].

    D = [[1], [0]] and d = 2 read the first number and add 2; relu; U = [[1, 0]], u = [1, 1]; s = 3, 1 or 4:
      after it:  y = [4, 8] + s [(4 + 2) + 1, 1];   beside it:  y = [4, 8] + s [(1 + 2) + 1, 1].
    """
    x = jnp.array([[1.0, 2.0]])
    params = {"twice": {"mix": {"kernel": 2.0 * jnp.eye(2)}}}
    method = adapter(size=1, placement=placement, targets=["twice"], activation="relu", scale=scale)
    frozen, trainable = method.init(jax.random.key(0), params, sites.find(Model().apply, params, x))
    leaves = trainable["twice"]["adapter"]["default"]
    assert {k: v.shape for k, v in leaves.items()} == {"down": (2, 1), "up": (1, 2), "down_bias": (1,), "up_bias": (2,)}
    leaves |= {
        "down": jnp.array([[1.0], [0.0]]),
        "down_bias": jnp.array([2.0]),
        "up": jnp.array([[1.0, 0.0]]),
        "up_bias": jnp.array([1.0, 1.0]),
    }
    y = injection.inject(Model().apply, method)({"params": tree.merge(frozen, trainable)}, x)
    assert y.tolist() == [[1.0 + after[0], 2.0 + after[1]]]


@pytest.mark.parametrize("placement, modules", [("houlsby", {"self_attn", "mlp"}), ("scaled_parallel", {"mlp"})])
def test_placements(placement, modules):
    part = jax.eval_shape(
        lambda p: adapter(placement=placement).init(jax.random.key(0), p, tiny.found()), tiny.params()
    )
    assert {p.split("/")[2] for p in tree.flatten(part.trainable)} == modules


def test_errors():
    with pytest.raises(ValueError, match="'serial' is none of houlsby"):
        adapter(placement="serial")
    with pytest.raises(ValueError, match="match no module"):
        adapter(targets=["no_such"]).init(jax.random.key(0), tiny.params(), tiny.found())
    assert adapter().fold is None


def test_a_module_that_is_given_no_floating_numbers():
    """The token ids of a table: leaves in their dtype would be whole numbers."""
    model, params, ids, found = toys.found("tied")
    method = adapter(size=4, targets=["embed"])
    part = toys.start(method, params, found)
    with pytest.raises(ValueError, match="adapter: 'embed' is given no array of floating numbers"):
        toys.run(model, method, tree.merge(*part), ids)
