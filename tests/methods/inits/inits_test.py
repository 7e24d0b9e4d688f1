"""Starts: the adapted model begins as the untouched one, and what they are famous for is true of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import injection, sites, tree
from peftax.methods import inits
from peftax.methods.lora import lora
from peftax.weights import adapters
from tests.core import toys
from tests.methods import tiny

MOVING = [name for name in inits.names() if inits.module(name).MOVES]


def start(name, w, rank=3, scale=0.5):
    return getattr(inits.module(name), name)(jax.random.key(0), w, rank, scale)


@pytest.fixture
def w():
    return jnp.asarray(np.random.default_rng(0).normal(size=(12, 7)), jnp.float32)


@pytest.mark.parametrize("name", inits.names())
def test_shapes(name, w):
    """What leaves the base where it is adds nothing to it."""
    a, b = start(name, w, rank=4)
    assert a.shape == (12, 4) and b.shape == (4, 7)
    assert inits.module(name).MOVES == bool(np.abs(a @ b).max() > 1e-6)


@pytest.mark.parametrize("name", MOVING)
def test_a_rank_above_the_smaller_side(name, tmp_path):
    """What no decomposition has is zeros, and the file can be read."""
    model, params, x, found = toys.found("mlp")
    method = lora(rank=6, alpha=3.0, init=name)  # kernels [5, 7] and [7, 3]
    part = toys.start(method, params, found)
    assert sites.count(method, params, found)["trainable"] == tree.count(part.trainable) == 6 * (5 + 7 + 7 + 3)
    y = model.apply({"params": params}, x)
    toys.close(toys.run(model, method, tree.merge(*part), x), y, 1e-5)
    part = part._replace(trainable=toys.perturb(part.trainable))
    adapters.save(tmp_path / "a", part, method, found)
    again, loaded, _ = adapters.load(tmp_path / "a", params, found)
    y = toys.run(model, method, tree.merge(*part), x)
    toys.close(toys.run(model, again, tree.merge(*loaded), x), y, 1e-5)


@pytest.mark.parametrize("name", ["pissa", "pissa_fast"])
def test_pissa_takes_the_principal_part(name, w):
    """What is left has the smaller singular values (Eckart and Young)."""
    a, b = start(name, w)
    values = np.linalg.svd(np.asarray(w), compute_uv=False)
    left = np.linalg.svd(np.asarray(w - 0.5 * a @ b), compute_uv=False)
    np.testing.assert_allclose(left[:4], values[3:], rtol=1e-4)
    np.testing.assert_allclose(np.square(a).sum(0), values[:3] / 0.5, rtol=1e-4)  # shared evenly by both factors
    np.testing.assert_allclose(np.square(b).sum(1), values[:3] / 0.5, rtol=1e-4)


def test_olora_is_orthonormal(w):
    a, b = start("olora", w)
    np.testing.assert_allclose(b @ b.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(a @ b, w @ b.T @ b, atol=1e-5)  # W projected on B's rows


def test_orthogonal_is_small_halves_of_one_basis(w):
    a, b = start("orthogonal", w, rank=4)
    assert np.linalg.matrix_rank(a) == np.linalg.matrix_rank(b) == 2
    assert float(a.std()) == pytest.approx(0.1 / np.sqrt(2), rel=0.4)
    with pytest.raises(ValueError, match="rank 3 must be even"):
        start("orthogonal", w)


def test_unknown_names_the_nearest():
    with pytest.raises(ValueError, match="'pisa' does not exist; the nearest: 'pissa'"):
        lora(init="pisa")


@pytest.fixture(scope="module", params=MOVING)
def moved(request):
    method = lora(rank=3, alpha=6.0, init=request.param, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3.0})
    return method, jax.jit(lambda p: method.init(jax.random.key(0), p, tiny.found()))(tiny.params())


def logits(method, params):
    batch = tiny.batch()
    apply = tiny.model().apply if method is None else injection.inject(tiny.model().apply, method)
    out = jax.jit(apply)({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"])
    return np.asarray(out)[batch["segment_ids"] > 0]


def test_moves_the_base_and_begins_as_the_untouched_one(moved):
    method, part = moved
    assert tiny.distance(logits(method, tree.merge(*part)), logits(None, tiny.params())) <= 1e-5
    before, after = tree.flatten(tiny.params()), tree.flatten(part.frozen)
    assert all(
        tiny.distance(before[s.kernel], after[s.kernel]) > 0.05
        for s in tiny.found().values()
        if s.kind == "linear" and s.path != "lm_head"
    )


def test_moves_again_to_the_same_bits(moved):
    """What a resumed run does: the untouched base and the leaves of the start, without another decomposition."""
    method, _ = moved
    fresh = method.init(jax.random.key(0), tiny.params(), tiny.found())
    base = tree.flatten(tiny.params())
    theta = tree.unflatten({p: x for p, x in tree.flatten(fresh.frozen).items() if p not in base})
    again = method.move(tree.merge(tiny.params(), theta), tiny.found())
    own = {p: x for p, x in tree.flatten(fresh.frozen).items() if p in base}
    jax.tree.map(np.testing.assert_array_equal, own, tree.flatten(again))


def test_is_saved_as_an_adapter_of_the_untouched_base(moved, tmp_path):
    method, part = moved
    part = part._replace(trainable=tiny.perturb(part.trainable))
    part = part._replace(trainable=_unpadded(part.trainable))
    adapters.save(tmp_path / "a", part, method, tiny.found())
    plain, loaded, raw = adapters.load(tmp_path / "a", tiny.params(), tiny.found())
    assert raw["init_lora_weights"] is True and raw["r"] == 6 and raw["rank_pattern"] == {"q_proj": 4}
    assert tiny.distance(logits(plain, tree.merge(*loaded)), logits(method, tree.merge(*part))) <= 1e-5
    folded = method.fold(tree.merge(*part), tiny.found())
    assert tiny.distance(logits(None, folded), logits(method, tree.merge(*part))) <= 1e-5


def _unpadded(trainable):
    """Noise must not fill what is no rank of q_proj."""
    q = trainable["model"]["layers"]["self_attn"]["q_proj"]["lora"]["default"]
    q["a"], q["b"] = q["a"][..., :2], q["b"][..., :2, :]
    return trainable
