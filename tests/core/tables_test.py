"""Tables of tokens and heads in int8: what is looked up, what a tied head makes of it, what methods do there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax import models
from peftax.core import adapters, quantization, sites, tree
from peftax.core.injection import inject
from peftax.core.method import chain
from peftax.methods import make
from peftax.ops import product
from peftax.ops.qtensor import dense
from peftax.ops.quantize import quantize
from tests.methods import tiny

RULES = (("embed_tokens|lm_head", {"fmt": "int8"}),)
IDS = jnp.array([[3, 0, 5, 3, 1]])


def test_rows_by_hand():
    """A row of 1.27, -2 has steps of 2/127: 80.6 of them, and -127; another row's large number does not touch it."""
    table = quantize(jnp.array([[1.27, -2.0], [254.0, 4.0]]), "int8", by_row=True)
    np.testing.assert_array_equal(table.packed, [[81, -127], [127, 2]])
    np.testing.assert_allclose(table.scale[:, 0, 0], [2 / 127, 2.0], rtol=1e-6)
    looked_up = product.matmul(jnp.array([[1, 0]]), table)
    np.testing.assert_allclose(looked_up, [[[254.0, 4.0], [81 * 2 / 127, -2.0]]], rtol=1e-6)


def test_a_head_that_is_the_table():
    w = quantize(jax.random.normal(jax.random.key(0), (11, 8)), "int8", by_row=True)
    x = jax.random.normal(jax.random.key(1), (2, 3, 8))
    assert w.T.shape == (8, 11) and w.T.T.shape == w.shape
    np.testing.assert_array_equal(dense(w.T), dense(w).T)

    def through(f):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(f(x))))(x)

    ours, theirs = through(lambda x: product.matmul(x, w.T)), through(lambda x: x @ dense(w).T)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
    with pytest.raises(ValueError, match="rows: a table of tokens is held in int8, not in int8 transposed"):
        product.matmul(jnp.array([1]), w.T)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request):
    """(model, its sites, packed parameters, the same as numbers)"""
    model = models.build({**tiny.CONFIG, "tie_word_embeddings": request.param})
    params = model.init(jax.random.key(0), IDS)["params"]
    found = sites.find(model.apply, params, IDS)
    packed = quantization.quantize(params, RULES, found)
    return model, found, packed, tree.unflatten({p: dense(x) for p, x in tree.flatten(packed).items()})


def test_what_is_packed(base):
    _, _, packed, _ = base
    kinds = {p: x.by_row for p, x in tree.flatten(packed).items() if tree.is_packed(x)}
    assert kinds.pop("model/embed_tokens/embedding")
    assert kinds in ({}, {"lm_head/kernel": False})


METHODS = {
    "none": None,
    "lora": {"name": "lora", "rank": 2, "targets": ("embed_tokens", "lm_head", "q_proj")},
    "tokens": {"name": "trainable_tokens", "tokens": (1, 5)},
    "prompt": {"name": "prompt", "length": 3},
    "rows": {"name": "prompt", "length": 3, "init": "tokens", "init_ids": (1, 5)},
    "vocabulary": {"name": "prompt", "length": 3, "init": "vocabulary"},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_model_equals_that_of_the_numbers(base, name):
    """The same logits and gradients, and folded the same again."""
    model, found, packed, plain = base
    given = dict(METHODS[name] or {"name": "lora", "rank": 2, "targets": ("q_proj",)})
    method = make(given.pop("name"), **given)
    apply = inject(model.apply, method)
    part = method.init(jax.random.key(1), packed, found)
    theta = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), part.trainable)
    same = method.init(jax.random.key(1), plain, found).frozen

    def through(frozen):
        return jax.value_and_grad(lambda t: jnp.sum(jnp.sin(apply({"params": tree.merge(frozen, t)}, IDS))))(theta)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), through(part.frozen), through(same)
    )
    if method.fold is None:
        return
    folded = method.fold(tree.merge(part.frozen, theta), found)
    untied = models.build({**tiny.CONFIG, "tie_word_embeddings": "lm_head" not in folded})
    want = apply({"params": tree.merge(part.frozen, theta)}, IDS)
    np.testing.assert_allclose(inject(untied.apply, chain())({"params": folded}, IDS), want, rtol=1e-4, atol=1e-4)


def test_several_at_once_fold_as_one_does(base):
    _, found, packed, _ = base
    method = make("lora", rank=2, targets=("lm_head",))
    part = method.init(jax.random.key(1), packed, found)
    params = tree.merge(part.frozen, tiny.perturb(part.trainable))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        adapters.together(method).fold(params, found),
        method.fold(params, found),
    )
