import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core.method import Ctx, Kernel
from peftax.methods.ia3 import ia3
from tests.methods import hand


def test_by_hand():
    """[6, 5, 2] ⊙ [1, 2, 3]; kernel and bias by column."""
    y, kernel, bias = hand.outcome(ia3(targets=["layers_0"], feedforward=()), {"l_out": jnp.array([[1.0, 2.0, 3.0]])})
    assert y == [[6.0, 10.0, 6.0]]
    assert kernel == [[1.0, 0.0, 3.0], [2.0, 4.0, 0.0]] and bias == [1.0, 2.0, 3.0]


def test_by_hand_feedforward():
    """[1, 2] ⊙ [3, 4] = [3, 8]; [3, 8] W + b = [19, 16, 3] + 1; the bias stays."""
    method = ia3(targets=["layers_0"], feedforward=["layers_0"])
    y, kernel, bias = hand.outcome(method, {"l_in": jnp.array([[3.0], [4.0]])})
    assert y == [[20.0, 17.0, 4.0]]
    assert kernel == [[3.0, 0.0, 3.0], [8.0, 8.0, 0.0]] and bias == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("leaf, shape", [("l_out", (1, 40)), ("l_in", (40, 1))])
def test_a_small_gain_acts_in_bf16(leaf, shape):
    """1.003 is 1 in bf16."""
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((40, 40), (30, 40)))

    def call(gain):
        theta = {"default": {leaf: jnp.full(shape, gain, jnp.float32)}}
        return ia3(targets=["any"]).parts[0].call(theta, x, Kernel(w), Ctx(), "")

    before, after = call(1.0), call(1.003)
    assert before.dtype == after.dtype == jnp.bfloat16
    before, after = (float(jnp.sum(jnp.abs(y.astype(jnp.float32)))) for y in (before, after))
    assert after / before == pytest.approx(1.003, abs=1e-3)


def test_other_biases_do_not_train():
    with pytest.raises(TypeError, match="bias"):
        ia3(bias="all")
