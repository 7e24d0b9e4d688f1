import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import tree

PARAMS = {"a": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}, "b": np.ones(4)}


def test_flatten_and_back():
    flat = tree.flatten(PARAMS)
    assert list(flat) == ["a/kernel", "a/bias", "b"]
    assert tree.unflatten(flat) == PARAMS


def test_split_is_disjoint_and_merge_its_inverse():
    rest, chosen = tree.split(PARAMS, lambda path: path.endswith("bias"))
    assert list(tree.flatten(chosen)) == ["a/bias"]
    assert list(tree.flatten(rest)) == ["a/kernel", "b"]
    merged = tree.merge(rest, chosen)
    assert tree.flatten(merged).keys() == tree.flatten(PARAMS).keys()
    assert merged["a"]["kernel"] is PARAMS["a"]["kernel"]  # leaves are not copied


@pytest.mark.parametrize("other", [{"a": {"bias": 1}}, {"a": 1}, {"b": {"c": 1}}])
def test_merge_refuses_an_overlap(other):
    with pytest.raises(ValueError, match="both trees hold '(a/bias|a|b)'.*disjoint"):
        tree.merge(PARAMS, other)


def test_merge_leaves_its_inputs_alone():
    one, two = {"a": {"x": 1}}, {"a": {"y": 2}}
    merged = tree.merge(one, two)
    merged["a"]["z"] = 3
    assert (one, two) == ({"a": {"x": 1}}, {"a": {"y": 2}})


def test_sizes():
    assert tree.count(PARAMS) == 13
    assert tree.nbytes({"a": jnp.ones((2, 3), jnp.bfloat16), "b": np.ones(2, np.float32)}) == 20
    shapes = tree.abstract(PARAMS)
    assert shapes["a"]["kernel"].shape == (2, 3) and tree.count(shapes) == 13


def test_nearest():
    assert tree.nearest("q_prjo", ["k_proj", "q_proj", "norm"], n=1) == "'q_proj'"
    assert tree.nearest("x", []) == "nothing"
