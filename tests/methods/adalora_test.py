import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from peftax.core import injection, tree
from peftax.methods.adalora import adalora, budget
from peftax.weights import adapters
from tests.methods import contract_test as contract
from tests.methods import hand, tiny

SMALL = TOY = {"rank": 4, "target_rank": 2, "alpha": 300.0}  # A and B of 0.02 make small updates


def test_by_hand():
    """xA = [1, 2] [[1], [1]] = 3; times e = 2: 6; B = [1, 0, 2], s = 4 / (1 + 1e-5): [6, 5, 2] + 24 [1, 0, 2]."""
    y, kernel, _ = hand.outcome(
        adalora(rank=1, target_rank=1, alpha=4.0, targets=["layers_0"]),
        {"a": jnp.array([[1.0], [1.0]]), "e": jnp.array([[2.0]]), "b": jnp.array([[1.0, 0.0, 2.0]])},
    )
    np.testing.assert_allclose(y, [[6.0 + 24.0, 5.0, 2.0 + 48.0]], rtol=2e-5)
    np.testing.assert_allclose(kernel, [[9.0, 0.0, 17.0], [10.0, 2.0, 16.0]], rtol=2e-5)


def test_penalty_by_hand():
    """AᵀA - I = [[3, 0], [0, -1]], BBᵀ - I = [[0, 2], [2, 3]]: sqrt(10) and sqrt(17)."""
    method = adalora(rank=2, target_rank=1, orthogonal=0.5, targets=["q_proj"])
    frozen, trainable = method.init(jax.random.key(0), tiny.params(), tiny.found())
    flat = {p: np.zeros(x.shape, np.float32) for p, x in tree.flatten(trainable).items()}
    for path, x in flat.items():
        if path.endswith("/a"):
            x[:, 0, 0] = 2
        if path.endswith("/b"):
            x[:, 0, 0], x[:, 1, 0] = 1, 2
    value = method.penalty(tree.merge(frozen, tree.unflatten(flat)), tiny.found())
    assert float(value) == pytest.approx(0.5 * (np.sqrt(10) + np.sqrt(17)) / 2)


def test_budget():
    """b(t) = bT + (b0 - bT)(1 - (t - ti) / (T - ti - tf))³, cut to whole ranks; exact."""
    made = budget(144, 96, 100, 10, 20)
    assert made.shape == (81,) and made[:11].tolist() == [144] * 11 and made[80] == 96
    assert made[45] == 96 + 48 // 8  # half way
    assert made[24] == int(48 * (1 - 14 / 70) ** 3 + 96)
    assert (np.diff(made) <= 0).all()


def ranks(trainable):
    return sum(int((np.asarray(x) != 0).sum()) for p, x in tree.flatten(trainable).items() if p.endswith("/e"))


def run(method, steps, scan=True):
    """The trainable half after each step, with gradients from numpy."""
    part = method.init(jax.random.key(0), tiny.params(), tiny.found())
    optimizer = method.wrap(optax.adam(1e-2), steps, tiny.found())
    trainable, state = part.trainable, optimizer.init(part.trainable)
    update, rng, seen = jax.jit(optimizer.update), np.random.default_rng(0), []
    for _ in range(steps):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), trainable)
        updates, state = update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        seen.append(trainable)
    assert update._cache_size() == 1
    return seen


def test_the_sum_of_ranks_is_the_budget():
    method = adalora(rank=4, target_rank=2, first_steps=2, final_steps=3, targets=["q_proj", "down_proj"])
    counted = [ranks(t) for t in run(method, 12)]
    assert counted == [*budget(16, 8, 12, 2, 3).tolist()[1:], 8, 8, 8]


def test_allocates_every_so_often():
    method = adalora(rank=4, target_rank=1, every=3, final_steps=2, targets=["q_proj"])
    counted = [ranks(t) for t in run(method, 9)]
    b = budget(8, 2, 9, 0, 2)
    assert counted == [8, 8, b[3], 8, 8, b[6], 2, 2, 2]  # in between e grows again; at 7 the last


def test_layers_that_are_no_targets_have_no_part_in_the_budget():
    method = adalora(rank=4, target_rank=2, targets=["q_proj", "down_proj"], layers=[1])
    part = method.init(jax.random.key(0), tiny.params(), tiny.found())
    optimizer = method.wrap(optax.adam(1e-2), 2, tiny.found())
    state = optimizer.init(part.trainable)
    ones = jax.tree.map(jnp.ones_like, part.trainable)
    trainable = part.trainable
    for _ in range(2):
        updates, state = optimizer.update(ones, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    layers = {p: np.asarray(x)[:, 0] for p, x in tree.flatten(trainable).items() if p.endswith("/e")}
    assert sum(int((x[1] != 0).sum()) for x in layers.values()) == 4


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_rank": 13}, "target_rank <= rank"),
        ({"beta1": 1.0}, "beta1 1.0"),
        ({"orthogonal": -1.0}, "orthogonal -1.0"),
        ({"every": 0}, "every >= 1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        adalora(**settings)


def test_a_run_too_short_for_its_phases():
    method = adalora(first_steps=5, final_steps=5)
    with pytest.raises(ValueError, match="first_steps 5 and final_steps 5 leave none of 10 steps"):
        method.wrap(optax.sgd(1.0), 10, tiny.found())


def test_one_device_and_eight():
    """Sensitivities lie as the leaves that they belong to; the same ranks stay."""
    case, runs = contract.Case("adalora"), {}
    case.method = tiny.method("adalora", targets=["q_proj", "down_proj"], final_steps=5)
    case.optimizer = case.method.wrap(tiny.either(), 20, tiny.found())
    for devices in ("1", "2x4"):
        losses, _, state = case.sgd(devices)
        runs[devices] = losses, state.trainable
        assert ranks(state.trainable) == 8
    np.testing.assert_allclose(runs["2x4"][0], runs["1"][0], rtol=1e-4)
    tiny.close(runs["1"][1], runs["2x4"][1], 1e-3)


def test_shrunk_adapters_are_files_of_their_ranks(tmp_path):
    """Ranks that the budget took are left out; what is read computes the same, and is written again the same."""
    method = adalora(rank=4, target_rank=2, targets=["q_proj", "down_proj"], final_steps=2)
    part = method.init(jax.random.key(0), tiny.params(), tiny.found())
    part = part._replace(trainable=run(method, 8)[-1])
    adapters.save(tmp_path / "a", part, method, tiny.found())
    again, read, raw = adapters.load(tmp_path / "a", tiny.params(), tiny.found())
    masks = raw["rank_pattern"]
    assert set(masks) == {f"model.layers.{i}.{m}.lora_E" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")}
    assert sum(map(sum, masks.values())) == 8 and {len(m) for m in masks.values()} == {4}
    held = load_file(tmp_path / "a" / adapters.TENSORS)
    assert sum(len(x) for key, x in held.items() if key.endswith("lora_E")) == 8
    assert not any(key.endswith("real") for key in held)

    def logits(method, part):
        batch = tiny.batch()
        apply = injection.inject(tiny.model().apply, method)
        return apply({"params": tree.merge(*part)}, batch["tokens"], batch["positions"], batch["segment_ids"])

    assert tiny.distance(logits(method, part), logits(again, read)) < 1e-6
    adapters.save(tmp_path / "b", read, again, tiny.found(), extra=raw)
    assert (tmp_path / "a" / adapters.TENSORS).read_bytes() == (tmp_path / "b" / adapters.TENSORS).read_bytes()
    part = method.init(jax.random.key(0), tiny.params(), tiny.found())
    adapters.save(tmp_path / "c", part, method, tiny.found())
    assert adapters.load(tmp_path / "c", tiny.params(), tiny.found())[2]["rank_pattern"] is None
