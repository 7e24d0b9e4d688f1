import jax.numpy as jnp
import pytest

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


def test_other_biases_do_not_train():
    with pytest.raises(TypeError, match="bias"):
        ia3(bias="all")
