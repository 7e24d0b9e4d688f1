import functools
import math

import jax
import numpy as np
import pytest

from peftax import combination, methods
from peftax.core import adapters, injection, tree
from tests.core import toys
from tests.methods import tiny


@functools.cache
def made(name="lora", seed=1, **settings):
    """(method, partition) on the tiny Llama, away from its start."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    method = tiny.method(name, **settings)
    part = jax.jit(lambda p: method.init(jax.random.key(seed), p, tiny.found()))(tiny.params())
    return method, part._replace(trainable=tiny.perturb(part.trainable, seed))


def deltas(method, part):
    """{module: ΔW}."""
    return {n: x["scale"] * (x["a"] @ x["b"]) for n, x in adapters.layers(method, part, tiny.found()).items()}


RED = dict(rank=3, alpha=5.0, targets=("q_proj", "down_proj"), seed=1)
BLUE = dict(rank=3, alpha=6.0, targets=("q_proj", "up_proj"), seed=2)


def both():
    return [made(**RED), made(**BLUE)]


def test_cat_is_the_weighted_sum_and_takes_the_ranks_of_both():
    result = combination.combine(both(), [0.7, -0.4], tiny.found(), kind="cat", adapter="mix")
    red, blue = (deltas(*one) for one in both())
    got = deltas(result.method, result.part)
    assert got.keys() == red.keys() | blue.keys() and not result.errors
    for name in got:
        tiny.close(got[name], 0.7 * red.get(name, 0) - 0.4 * blue.get(name, 0), 1e-6)
    ranks = {n: x["a"].shape[1] for n, x in adapters.layers(result.method, result.part, tiny.found()).items()}
    assert {n.split(".")[-1]: r for n, r in ranks.items()} == {"q_proj": 6, "down_proj": 3, "up_proj": 3}
    assert result.method.config["targets"] == ["down_proj", "q_proj", "up_proj"]
    assert any("/lora/mix/" in p for p in tree.flatten(result.part.trainable))
    assert not any("/lora/default/" in p for p in tree.flatten(tree.merge(*result.part)))


def test_svd_is_the_best_of_that_sum():
    result = combination.combine(both(), [0.7, -0.4], tiny.found(), kind="svd", rank=4)
    red, blue = (deltas(*one) for one in both())
    name = "model.layers.0.self_attn.q_proj"
    whole = 0.7 * red[name] - 0.4 * blue[name]
    u, s, v = np.linalg.svd(whole.astype(np.float64))
    tiny.close(deltas(result.method, result.part)[name], (u[:, :4] * s[:4]) @ v[:4], 1e-5)
    left, norm = result.errors[name]
    assert left == pytest.approx(math.sqrt((s[4:] ** 2).sum()), rel=1e-4)
    assert norm == pytest.approx(np.linalg.norm(whole), rel=1e-5)
    worst = combination.combine(both(), [0.7, -0.4], tiny.found(), kind="svd", rank=1)
    assert 0 < result.error < worst.error < 1


def test_clamp_cuts_the_largest():
    free, cut = (combination.combine(both(), [1, 1], tiny.found(), clamp=c) for c in (1.0, 0.9))
    for name, leaves in adapters.layers(cut.method, cut.part, tiny.found()).items():
        before = adapters.layers(free.method, free.part, tiny.found())[name]
        sizes = {k: np.abs(before[k]) for k in "ab"}
        high = max(np.abs(leaves[k]).max() for k in "ab")
        assert high < max(s.max() for s in sizes.values())
        share = np.mean(np.concatenate([s.ravel() > high for s in sizes.values()]))
        assert share == pytest.approx(0.2, abs=0.02)


def test_ties_by_hand():
    """Of [3, -1, 2, 0.5] and [-1, -2, 4, 0.25] half stays: [3, 0, 2, 0] and [0, -2, 4, 0]; signs +, -, +; the mean of
    those that agree: 3 / 1, -2 / 1, (2 + 4) / 2.
    """
    merge = functools.partial(combination._merge, drawn=None, density=0.5)
    tensors = [np.array([3.0, -1.0, 2.0, 0.5]), np.array([-1.0, -2.0, 4.0, 0.25])]
    assert merge("ties", tensors, [1.0, 1.0], majority="total").tolist() == [3.0, -2.0, 3.0, 0.0]
    assert merge("ties", tensors, [1.0, 0.5], majority="total").tolist() == [3.0, -1.0, 2.0, 0.0]
    assert merge("magnitude_prune", tensors, [1.0, 1.0], majority="total").tolist() == [3.0, -2.0, 6.0, 0.0]
    three = [np.array([3.0]), np.array([-1.0]), np.array([-1.0])]
    whole = functools.partial(combination._merge, "ties", three, [1.0] * 3, 1.0, drawn=None)
    assert whole(majority="total").tolist() == [3.0] and whole(majority="frequency").tolist() == [-1.0]


@pytest.mark.parametrize("rule", ["dare_linear", "dare_ties"])
def test_dare_keeps_its_density_and_the_expectation(rule):
    drawn = np.random.default_rng(0)
    tensor = np.full(200_000, 2.0)
    got = combination._merge(rule, [tensor], [0.5], 0.25, "total", drawn)
    assert set(np.unique(got)) == {0.0, 4.0}
    assert (got != 0).mean() == pytest.approx(0.25, rel=0.02) and got.mean() == pytest.approx(1.0, rel=0.02)
    a, b = (combination.combine(both(), [1, 1], tiny.found(), kind=rule, density=0.5, seed=s) for s in (0, 1))
    again = combination.combine(both(), [1, 1], tiny.found(), kind=rule, density=0.5, seed=0)
    jax.tree.map(np.testing.assert_array_equal, a.part, again.part)
    assert tiny.distance(*(list(deltas(x.method, x.part).values())[0] for x in (a, b))) > 0.1


def test_truncate():
    method, part = made(rank=6, rank_pattern=(("1.self_attn.q_proj", 4),), targets=("q_proj", "down_proj"))
    before = deltas(method, part)
    same = combination.truncate(method, part, tiny.found(), 6)
    assert same.error < 1e-6 and same.method.config["targets"] == ["q_proj", "down_proj"]
    tiny.close(deltas(same.method, same.part), before, 1e-5)
    two = combination.truncate(method, part, tiny.found(), 2, adapter="small")
    for name, now in deltas(two.method, two.part).items():
        u, s, v = np.linalg.svd(before[name].astype(np.float64))
        tiny.close(now, (u[:, :2] * s[:2]) @ v[:2], 1e-5)
        assert two.errors[name][0] == pytest.approx(np.linalg.norm(before[name] - now), rel=1e-3)
    shares = combination.truncate(method, part, tiny.found(), 0.9)
    assert 0 < shares.error <= math.sqrt(0.1)
    ranks = {x["a"].shape[1] for x in adapters.layers(shares.method, shares.part, tiny.found()).values()}
    assert max(ranks) < 6
    assert f"{shares.error:.2%}" in combination.report(shares).splitlines()[-1]


@pytest.mark.parametrize("name, rank", [("loha", 24), ("dora", 24), ("hira", 24), ("miss", 4)])
def test_convert(name, rank):
    """At the update's rank nothing is lost: the same logits; at a lower one the error is what it says."""
    method, part = made(name, layers=(1,), **({"rank": rank} if name == "miss" else {}))
    whole = combination.convert(method, part, tiny.found(), rank, adapter="as_lora")
    assert whole.error < 1e-6 and set(whole.errors) == {n for n in whole.errors if ".layers.1." in n}
    batch = tiny.batch()

    def logits(method, part):
        apply = injection.inject(tiny.model().apply, method)
        return apply({"params": tree.merge(*part)}, batch["tokens"], batch["positions"], batch["segment_ids"])

    real = batch["segment_ids"] > 0
    assert tiny.distance(logits(method, part)[real], logits(whole.method, whole.part)[real]) <= 2e-5
    low = combination.convert(method, part, tiny.found(), 2)
    kept, every = (deltas(x.method, x.part) for x in (low, whole))
    left = math.sqrt(sum(np.square(every[n] - kept[n]).sum() for n in every))
    assert low.error == pytest.approx(left / math.sqrt(sum(np.square(x).sum() for x in every.values())), rel=1e-3)
    assert 0.05 < low.error < 1
    assert low.method.config["layers"] == [1]


def test_refusals():
    found, red, blue = tiny.found(), made(**RED), made(rank=2, targets=("q_proj",))
    with pytest.raises(ValueError, match="kind 'tis' is none of cat, svd"):
        combination.combine([red], [1], found, kind="tis")
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        combination.combine([red, blue], [1], found)
    with pytest.raises(ValueError, match="ties wants a density"):
        combination.combine([red, red], [1, 1], found, kind="ties")
    with pytest.raises(ValueError, match=r"q_proj' the adapters have ranks \[2, 3\].*use cat"):
        combination.combine([red, blue], [1, 1], found, kind="linear")
    with pytest.raises(ValueError, match="only lora can be combined.*convert it first"):
        combination.combine([made("loha")], [1], found)
    with pytest.raises(ValueError, match="changes the bias of 'model/layers/"):
        combination.convert(*made("ia3"), found, 4)
    with pytest.raises(ValueError, match="prefix 'default' is no change of weights"):
        combination.convert(*made("prefix"), found, 4)
    for settings, leaf in (
        ({"b_bias": True}, "'c' at 'model.layers.0.*q_proj"),
        ({"tokens": (3, 5)}, "'ids' at 'model.emb"),
    ):
        with pytest.raises(ValueError, match=f"holds {leaf}.*would be lost.*without b_bias and tokens"):
            combination.combine([red, made(rank=3, targets=("q_proj",), **settings)], [1, 1], found)
        with pytest.raises(ValueError, match=f"lora 'default'.* holds {leaf}"):
            combination.truncate(*made(rank=3, targets=("q_proj",), **settings), found, 2)
    for rank in (0, 1.5):
        with pytest.raises(ValueError, match="truncate: "):
            combination.truncate(*red, found, rank)


def test_names_where_no_pattern_says_it():
    """Adapters of unlike layers: their lists together would mean other modules."""
    several = [made(rank=2, targets=("q_proj",), layers=(0,)), made(rank=2, targets=("k_proj",), layers=(1,))]
    result = combination.combine(several, [1, 1], tiny.found(), kind="linear")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]
    assert result.method.config["targets"] == names and sorted(deltas(result.method, result.part)) == names
    assert methods.make(result.method.name, **result.method.config).config == result.method.config


@pytest.mark.parametrize(
    "name, settings", [("lora", {"targets": ["mix"]}), ("trainable_tokens", {"targets": ["embed"]})]
)
def test_rows_of_tokens_at_a_tied_table_are_no_lora(name, settings):
    _, params, _, found = toys.found("tied")
    method = methods.make(name, tokens=(1, 4), **settings)
    with pytest.raises(ValueError, match="tokens changes 'embed' and the head 'lm_head' that is tied to it"):
        combination.convert(method, toys.start(method, params, found), found, 2)
