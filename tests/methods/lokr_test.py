import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import tree
from peftax.core.method import Ctx, Kernel
from peftax.methods.lokr import factorize, lokr
from tests.methods import hand, llama_3b, tiny


@pytest.mark.parametrize(
    "n, factor, pair",
    [
        (256, -1, (16, 16)),
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (128, 4, (4, 32)),
        (24, 5, (4, 6)),
        (4, 8, (2, 2)),
        (32, 16, (16, 2)),
        (1, -1, (1, 1)),
    ],
)
def test_factors_are_lycoris(n, factor, pair):
    assert factorize(n, factor) == pair


def test_by_hand():
    """in 2 = 1 * 2, out 3 = 1 * 3: W1 = [[3]], W2 = [[1, 0, 1], [0, 1, 0]], s = 2; x times the update: [6, 12, 6]."""
    leaves = {"w1": jnp.array([[3.0]]), "w2": jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])}
    y, kernel, _ = hand.outcome(lokr(rank=2, alpha=4.0, targets=["layers_0"]), leaves)
    assert y == [[12.0, 17.0, 8.0]]
    assert kernel == [[7.0, 0.0, 7.0], [2.0, 8.0, 0.0]]


def test_kronecker_by_hand():
    """W1 = [[1, 2]], W2 = [[1, 0], [3, 1]]: x = [1, 1] gives [[4, 1], [8, 2]] row by row."""
    theta = {"w1": jnp.array([[1.0, 2.0]]), "w2": jnp.array([[1.0, 0.0], [3.0, 1.0]]), "scale": jnp.float32(1.0)}
    call = lokr().parts[0].call
    y = call({"default": theta}, jnp.ones((1, 2)), Kernel(jnp.zeros((2, 4))), Ctx(), "")
    assert y.tolist() == [[4.0, 1.0, 8.0, 2.0]]


def test_no_array_of_the_kernels_size_is_made():
    call = lokr(rank=2).parts[0].call
    shapes = {"w1": (5, 4), "a2": (10, 2), "b2": (2, 10), "scale": ()}
    theta = {k: jnp.zeros(s) for k, s in shapes.items()}

    def step(theta, x, w):
        return jax.grad(lambda t: jnp.sum(call({"default": t}, x, Kernel(w), Ctx(), "") ** 2))(theta)

    program = jax.jit(step).lower(theta, jnp.zeros((7, 50)), jnp.zeros((50, 40))).compile().as_text()
    made = [line for line in program.splitlines() if "= f32[50,40]" in line and "parameter(" not in line]
    assert not made, made


@pytest.mark.parametrize(
    "settings, leaves",
    [
        ({"rank": 2}, {"w1", "a2", "b2"}),
        ({"rank": 2, "decompose_both": True, "decompose_factor": 8}, {"a1", "b1", "a2", "b2"}),
        ({"rank": 4}, {"w1", "w2"}),
    ],
)
def test_what_is_factored(settings, leaves):
    method = lokr(targets=["q_proj"], **settings)
    _, trainable = method.init(jax.random.key(0), tiny.params(), tiny.found())
    assert {p.rsplit("/", 1)[1] for p in tree.flatten(trainable)} == leaves


def test_layers_of_unlike_forms_need_a_model_without_scan():
    method = lokr(rank=2, rank_pattern={r"layers\.1\.self_attn\.q_proj": 8}, targets=["q_proj"])
    with pytest.raises(ValueError, match="unlike leaves.*scan=False"):
        method.init(jax.random.key(0), tiny.params(), tiny.found())
    _, trainable = method.init(jax.random.key(0), tiny.params(scan=False), tiny.found(scan=False))
    assert {p.rsplit("/", 1)[1] for p in tree.flatten(trainable)} == {"w1", "w2", "a2", "b2"}


@pytest.mark.parametrize("init, zero", [("w1", "w1"), ("w2", "w2")])
def test_which_begins_with_zeros(init, zero):
    _, trainable = lokr(init=init, targets=["q_proj"]).init(jax.random.key(0), tiny.params(), tiny.found())
    found = {p.rsplit("/", 1)[1]: bool(np.any(x)) for p, x in tree.flatten(trainable).items()}
    assert [leaf for leaf, some in found.items() if not some] == [zero]


def test_counts_are_those_of_pefts_run():
    config = {"peft_type": "LOKR", "r": 32, "alpha": 64, "decompose_factor": 4, "target_modules": ["v_proj", "q_proj"]}
    assert llama_3b.count(config) == {"trainable": 2_294_656, "total": 3_215_044_480}


def test_settings_are_checked():
    with pytest.raises(ValueError, match="lokr: rank 0 must be at least 1"):
        lokr(rank=0)
    with pytest.raises(ValueError, match="lokr: decompose_factor 0 must be -1 or at least 1"):
        lokr(decompose_factor=0)
    with pytest.raises(ValueError, match="lokr: init 'pissa' is none of"):
        lokr(init="pissa")
