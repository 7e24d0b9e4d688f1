import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core.method import Ctx, Kernel
from peftax.methods.boft import HF, boft, turn
from tests.methods import hand, llama_3b, tiny

SMALL = {"block_size": 4, "factors": 2, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
TOY = {"blocks": 1}  # the small models' sizes have no divisor in common


def test_by_hand():
    """A = [[0, 1/2], [-1/2, 0]]: R = [[3, -4], [4, 3]] / 5; x R W = [3, 0.8, 2.2]; times s, on a bias of ones."""
    leaves = {"r": jnp.array([[[[0.3, 1.0], [0.0, 0.7]]]]), "s": jnp.array([[2.0, 1.0, -1.0]])}
    y, kernel, bias = hand.outcome(boft(block_size=2, targets=["layers_0"]), leaves)
    np.testing.assert_allclose(y, [[7.0, 1.8, -1.2]], rtol=1e-6)
    np.testing.assert_allclose(kernel, [[-2.0, -1.6, -0.6], [4.0, 1.2, -0.8]], rtol=1e-6)
    assert bias == [1.0, 1.0, 1.0]


def test_a_butterfly_by_hand():
    """A quarter turn, [a, b] -> [b, -a], of inputs two apart, then of neighbours."""
    quarter = jnp.array([[0.0, -1.0], [1.0, 0.0]]) - jnp.eye(2)
    e = jnp.broadcast_to(quarter, (2, 2, 2, 2))
    x = jnp.array([[1.0, 2.0, 3.0, 4.0]])
    assert turn(x, e, [1]).tolist() == [[3, 4, -1, -2]]
    assert turn(x, e, [1, 0]).tolist() == [[4, -3, -2, 1]]


def test_a_butterfly_is_orthogonal_and_mixes_all():
    """8 inputs, blocks of two: after three factors each has met all others, after two half of them."""
    rng = np.random.default_rng(0)
    for factors, met in ((1, 2), (2, 4), (3, 8)):
        theta = {"r": jnp.asarray(rng.normal(size=(factors, 4, 2, 2)), jnp.float32), "s": jnp.ones((1, 8))}
        method = boft(block_size=2, factors=factors).parts[0]
        rotation = method.call({"default": theta}, jnp.eye(8), Kernel(jnp.eye(8)), Ctx(), "")
        np.testing.assert_allclose(rotation @ rotation.T, jnp.eye(8), atol=1e-6)
        assert ((jnp.abs(rotation) > 1e-6).sum(1) == met).all()


def test_dropout_leaves_out_blocks_of_one_factor():
    theta = {"r": jnp.zeros((2, 8, 2, 2)).at[..., 0, 1].set(1.0), "s": jnp.ones((1, 16)), "id": jnp.int32(0)}
    call = boft(block_size=2, factors=2, dropout=0.4).parts[0].call

    def rotation(key):
        return call({"default": theta}, jnp.eye(16), Kernel(jnp.eye(16)), Ctx(key=key), "q")

    drawn = np.asarray(jax.vmap(rotation)(jax.random.split(jax.random.key(0), 40)))
    # a block that is left out leaves two rows, or two columns, with two numbers of their four
    numbers = (np.abs(drawn) > 1e-6).sum((1, 2))
    assert (numbers == 16 * 4 - 3 * 2 * 2).all()
    assert len(np.unique(np.abs(drawn) > 1e-6, axis=0)) > 10


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"block_size": 5}, "block_size 5 fits no 24 inputs with 1 factors; the nearest that does is 4"),
        ({"block_size": 8, "factors": 3}, "block_size 8 fits no 24 inputs with 3 factors; the nearest that does is 6"),
        ({"blocks": 7}, "blocks 7 fits no 24 inputs with 1 factors; the nearest that does is (6|8)"),
        ({"factors": 6}, "block_size 4 fits no 24 inputs with 6 factors; take fewer factors"),
    ],
)
def test_sizes_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message) as raised:
        boft(targets=["q_proj"], **settings).init(jax.random.key(0), tiny.params(), tiny.found())
    assert raised.value.__notes__[0] == "at site 'model/layers/self_attn/q_proj'"


def test_a_file_of_fewer_factors_than_its_config_says():
    assert HF.opened
    tensors = {"base_model.model.q.boft_R": np.zeros((1, 2, 4, 4))}
    with pytest.raises(ValueError, match="holds 1 factor and boft_n_butterfly_factor is 3.*write 1"):
        HF.opened(tensors, {"factors": 3})
    assert HF.opened(tensors, {"factors": 1}) == tensors


def test_counts():
    """PEFT's method comparison shows 0.80M: 28 layers, 2 sites of 3072 inputs, with 3072 and 1024 outputs."""
    config = {"peft_type": "BOFT", "target_modules": ["q_proj", "v_proj"]}
    assert llama_3b.count(config)["trainable"] == 28 * (2 * 3072 * 4 + 3072 + 1024) == 802_816


def test_settings_are_checked():
    with pytest.raises(ValueError, match="boft: factors 0 must be at least 1"):
        boft(factors=0)
    with pytest.raises(ValueError, match="boft: dropout 1.0"):
        boft(dropout=1.0)
