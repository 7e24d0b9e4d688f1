import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax import models, sharding, weights
from peftax.core import sites, tree
from peftax.weights import grown
from tests.data import tiny
from tests.train import tiny_run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An untied base: two tables grow."""
    config = {**tiny_run.CONFIG, "vocab_size": len(tiny.tokenizer()), "tie_word_embeddings": False}
    params = models.build(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return weights.save(params, config, tmp_path_factory.mktemp("b") / "base", tokenizer=tiny.tokenizer()), params


def opened(folder, start="mean", n=3):
    source = grown.grow(weights.open(folder), [f"<{i}>" for i in range(n)], start=start)
    model = models.build(source.config)
    shapes = models.abstract(model)
    return source, shapes, source.for_model(shapes), sites.find(model.apply, shapes, jnp.zeros((1, 2), jnp.int32))


def test_new_rows_are_the_mean_of_the_old(base):
    folder, params = base
    source, shapes, tables, _ = opened(folder)
    old = len(params["model"]["embed_tokens"]["embedding"])
    assert tables == {"model/embed_tokens/embedding": old, "lm_head/kernel": old}
    assert source.config["vocab_size"] == old + 3 == len(source.tokenizer())
    loaded = weights.load(source, shapes)
    for ours, theirs in (
        (loaded["model"]["embed_tokens"]["embedding"], params["model"]["embed_tokens"]["embedding"]),
        (loaded["lm_head"]["kernel"].T, params["lm_head"]["kernel"].T),
    ):
        np.testing.assert_array_equal(ours[:old], theirs)
        np.testing.assert_allclose(ours[old:], jnp.tile(theirs.mean(0), (3, 1)), atol=1e-6)
    rest = {p: x for p, x in tree.flatten(loaded).items() if p not in tables}
    for path, x in rest.items():
        np.testing.assert_array_equal(x, tree.flatten(params)[path])


def test_normal_rows_are_the_same_every_time(base):
    a, b = (weights.load(*opened(base[0], "normal", n=40)[:2])["model"]["embed_tokens"]["embedding"] for _ in "ab")
    np.testing.assert_array_equal(a, b)
    assert float(a[-40:].std()) == pytest.approx(0.02, rel=0.1) and float(jnp.abs(a[-40:].mean())) < 2e-3
    assert (a[-1] != a[-2]).all()


@pytest.mark.parametrize("n", [2, 5])
def test_shards_read_their_own_rows(base, n):
    """Whether or not the rows divide among the devices."""
    source, shapes, tables, found = opened(base[0], n=n)
    mesh = sharding.make_mesh(data=1, fsdp=8)
    rules = [("embedding$|lm_head", ("fsdp", None))] if source.config["vocab_size"] % 8 == 0 else ()
    specs = sharding.base_specs(shapes, found, mesh, rules)
    places = tree.unflatten({p: jax.sharding.NamedSharding(mesh, s) for p, s in specs.items()})
    whole, parts = weights.load(source, shapes), weights.load(source, shapes, shardings=places)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_a_table_with_rows_to_spare_stays(base, tmp_path):
    folder, params = base
    old = len(params["model"]["embed_tokens"]["embedding"])
    wide = {**tiny_run.CONFIG, "vocab_size": old + 2}
    made = models.build(wide).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    spare = weights.save(made, wide, tmp_path / "spare", tokenizer=tiny.tokenizer())
    source, _, tables, _ = opened(spare, n=2)
    assert tables == {} and source.config["vocab_size"] == old + 2 == len(source.tokenizer())


def test_without_a_tokenizer(base, tmp_path):
    weights.save(base[1], tiny_run.CONFIG, tmp_path / "bare")
    with pytest.raises(ValueError, match="holds no tokenizer that could learn '<x>'"):
        grown.grow(weights.open(tmp_path / "bare"), ["<x>"])
    source = weights.open(base[0])
    assert grown.grow(source, []) is source
