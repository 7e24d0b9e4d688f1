import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peftax.core import sites, tree
from peftax.core.hf import Unsupported
from peftax.core.method import Ctx, Kernel
from peftax.methods.oft import HF, nearest_divisor, oft, skew
from tests.methods import hand, llama_3b, tiny

# small blocks: with noise of 0.7 in Q the sum is far from a rotation, and the more numbers meet, the larger it is
SMALL = {"block_size": 3, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
TOY = {"block_size": 7}  # the small models' sizes are near it, or have a divisor that is


def test_by_hand():
    """q = 1/2: Q² = -1/4 I, so that I + 2Q + 2Q² + 2Q³ + Q⁴ = 9/16 I + 3/2 Q; x R = [-15/16, 15/8]."""
    y, kernel, _ = hand.outcome(oft(block_size=2, targets=["layers_0"]), {"r": jnp.array([[0.5]])})
    assert y == [[3.8125, 4.75, 0.0625]]
    assert kernel == [[2.0625, 1.5, 0.5625], [0.375, 1.125, -0.75]]


def test_the_exact_transform_by_hand():
    """(I - Q) (I + Q)⁻¹ = [[3, -4], [4, 3]] / 5; x R = [2.2, 0.4]."""
    y, kernel, _ = hand.outcome(oft(block_size=2, terms=None, targets=["layers_0"]), {"r": jnp.array([[0.5]])})
    np.testing.assert_allclose(y, [[4.0, 1.8, 3.2]], rtol=1e-6)
    np.testing.assert_allclose(kernel, [[-1.0, -1.6, 0.6], [2.0, 1.2, 0.8]], rtol=1e-6)


@pytest.mark.parametrize(
    "terms, kernel", [(2, [[1, 1], [-1, 1]]), (3, [[0.5, 0.875], [-0.875, 0.5]]), (4, [[0.5, 0.875], [-0.875, 0.5]])]
)
def test_few_terms(terms, kernel):
    """I + 2Q, and I + 2Q + 2Q² + Q³ for three and for four, as PEFT counts."""
    assert turned(jnp.eye(2), {"r": jnp.array([[0.5]])}, block_size=2, terms=terms).tolist() == kernel


def turned(x, theta, ctx=Ctx(), **settings):  # noqa: B008
    """x R."""
    call = oft(**settings).parts[0].call
    return call({"default": theta}, x, Kernel(jnp.eye(x.shape[-1], dtype=x.dtype)), ctx, "q")


def test_pairs_are_counted_row_by_row():
    q = skew(jnp.array([[1.0, 7.0], [2.0, 8.0], [3.0, 9.0]]))
    assert q[0].tolist() == [[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]
    assert q[1].tolist() == [[0, 7, 8], [-7, 0, 9], [-8, -9, 0]]


def test_blocks_turn_apart_and_one_may_serve_all():
    x = jnp.array([[1.0, 2.0, 3.0, 4.0]])
    y = turned(x, {"r": jnp.array([[0.5, 0.0]])}, block_size=2, terms=None)
    np.testing.assert_allclose(y, [[2.2, 0.4, 3.0, 4.0]], rtol=1e-6)
    y = turned(x, {"r": jnp.array([[0.5]])}, block_size=2, terms=None, share=True)
    np.testing.assert_allclose(y, [[2.2, 0.4, 5.0, 0.0]], rtol=1e-6, atol=1e-6)


def test_the_exact_transform_is_orthogonal_and_the_sum_nearly():
    r = 0.02 * jnp.asarray(np.random.default_rng(0).normal(size=(28, 2)), jnp.float32)
    for terms, tolerance in ((None, 1e-6), (5, 1e-4)):
        rotation = turned(jnp.eye(16), {"r": r}, block_size=8, terms=terms)
        np.testing.assert_allclose(rotation @ rotation.T, jnp.eye(16), atol=tolerance)
        assert float(jnp.abs(rotation - jnp.eye(16)).max()) > 0.05


@pytest.mark.parametrize(
    "n, wanted, size", [(24, 32, 24), (40, 32, 40), (40, 22, 20), (9, 4, 3), (7, 4, 1), (12, 4, 4)]
)
def test_the_nearest_divisor(n, wanted, size):
    assert nearest_divisor(n, wanted) == size


def test_a_block_of_one_is_refused():
    method = oft(block_size=4, targets=["q_proj", "down_proj"])
    with pytest.raises(ValueError, match="block_size 4 each of 41 inputs.*divides them is 41") as raised:
        method.init(jax.random.key(0), tiny.params(), tiny.found())
    assert raised.value.__notes__[0] == "at site 'model/layers/mlp/down_proj'"


def test_dropout_leaves_out_a_fixed_number_of_blocks():
    theta = {"r": jnp.full((1, 10), 0.5), "id": jnp.int32(0)}
    x = jnp.ones((1, 20))

    def still(key, **settings):
        y = turned(x, theta, Ctx(key=key), block_size=2, **settings).reshape(10, 2)
        return (y == 1).all(1)

    drawn = np.asarray(jax.vmap(lambda key: still(key, dropout=0.35))(jax.random.split(jax.random.key(0), 40)))
    assert (drawn.sum(1) == 3).all() and drawn.any(0).all()
    theta["r"] = theta["r"][:, :1]
    assert not still(jax.random.key(0), dropout=0.9, share=True).any()


def test_constrained_blocks_stay_short():
    """‖Q‖ = sqrt(2) |r| <= eps / sqrt(1) = 0.1 sqrt(2); the gradient at the projected r, whatever lies outside."""
    settings = {"block_size": 2, "terms": 2, "constrained": True, "eps": 0.1 * 2**0.5}

    def y(r):
        return turned(jnp.ones((1, 2)), {"r": r}, **settings)[0]

    np.testing.assert_allclose(y(jnp.array([[0.05]])), [0.9, 1.1], rtol=1e-6)
    np.testing.assert_allclose(y(jnp.array([[7.0]])), [0.8, 1.2], rtol=1e-6)
    np.testing.assert_allclose(jax.jacobian(y)(jnp.array([[7.0]])).ravel(), [-2, 2], rtol=1e-6)


def test_constrained_training_keeps_what_is_stored_short():
    method = oft(block_size=2, constrained=True, eps=0.1 * 2**0.5, targets=["layers_0"])
    found = sites.find(hand.MODEL.apply, hand.PARAMS, hand.X)
    optimizer = method.wrap(optax.sgd(1.0), 10, found)
    held = {"layers_0": {"oft": {"default": {"r": jnp.array([[0.05]])}}}, "other": jnp.ones(1)}
    state = optimizer.init(held)
    for step, stored in ((-0.02, 0.07), (-0.5, 0.1), (0.3, -0.1)):
        updates, state = optimizer.update(jax.tree.map(lambda x, s=step: jnp.full_like(x, s), held), state, held)
        held = optax.apply_updates(held, updates)
        np.testing.assert_allclose(tree.flatten(held)["layers_0/oft/default/r"], [[stored]], rtol=1e-5)
    np.testing.assert_allclose(held["other"], [1 + 0.02 + 0.5 - 0.3], rtol=1e-6)


def test_an_embedding_turns_what_is_looked_up():
    table = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    method = oft(block_size=2, terms=None).parts[0]
    theta = {"r": jnp.array([[0.5]])}
    y = method.call({"default": theta}, jnp.array([1, 0]), Kernel(table, kind="embed"), Ctx(), "")
    np.testing.assert_allclose(y, [[5.0, 0.0], [2.2, 0.4]], rtol=1e-6, atol=1e-6)


def test_counts_are_those_of_pefts_run():
    config = {"peft_type": "OFT", "r": 32, "oft_block_size": 0, "target_modules": ["q_proj", "v_proj"]}
    assert llama_3b.count(config) == {"trainable": 8_171_520, "total": 3_220_921_344}


def test_old_files(caplog):
    with pytest.raises(Unsupported, match="no oft_block_size.*nearest"):
        HF.read({"peft_type": "OFT", "target_modules": ["q_proj"], "r": 8})
    config = {"target_modules": ["q_proj"], "oft_block_size": 8, "use_cayley_neumann": True}
    assert HF.read({**config, "peft_version": "0.21.2"})["terms"] == 5 and not caplog.text
    HF.read({**config, "peft_version": "0.17.1.dev0"})
    assert "before 0.18" in caplog.text


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"block_size": 1}, "block_size 1 must be at least 2"),
        ({"blocks": 0}, "blocks 0 must be at least 1"),
        ({"terms": 1}, "terms 1 must be at least 2"),
        ({"eps": 0.0}, "eps 0.0 must be positive"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=f"oft: {message}"):
        oft(**settings)
