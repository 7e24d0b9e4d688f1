"""Learning rates of their own, LoRA-FA's projection, and what a wrong key says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peftax import recipe
from peftax.core import injection, tree
from peftax.methods.lora import lora
from peftax.train import loss, optimizers
from peftax.train.step import State, make_step
from tests.methods import tiny

RATE = optax.constant_schedule(1e-2)


def run(method, steps=5, **settings):
    """(losses, trainable half at the end)"""
    part = method.init(jax.random.key(0), tiny.params(), tiny.found())
    optimizer = optimizers.make(**{"schedule": RATE, "name": "adam", "clip": None, **settings})
    step = make_step(injection.inject(tiny.model().apply, method), loss.causal_lm, optimizer)
    state, losses = State.create(part.trainable, optimizer), []
    for _ in range(steps):
        state, metrics = step(state, part.frozen, tiny.batch())
        losses.append(float(metrics["loss"]))
    return losses, tree.flatten(state.trainable)


def test_four_fields_have_two_symmetries():
    """alpha / (p q), p times A's start, p times A's rate, q times B's: the same run.

    "LoRA Without Regret"; Adam's eps is too small to be seen, and keeps the first step, where A has no slope, from 0/0.
    """
    p, q = 4.0, 0.5
    plain, trained = run(lora(rank=3, alpha=8.0), eps=1e-30)
    factors = (("/lora/.*/a$", p), ("/lora/.*/b$", q))
    other, others = run(lora(rank=3, alpha=8.0 / (p * q), init_scale=p), eps=1e-30, factors=factors)
    np.testing.assert_allclose(other, plain, rtol=1e-6)
    assert plain[-1] < 0.9 * plain[0]
    for path, x in trained.items():
        assert tiny.distance(others[path], x * (p if path.endswith("/a") else q)) <= 1e-5, path
    off, _ = run(lora(rank=3, alpha=8.0 / (p * q), init_scale=p), eps=1e-30, factors=factors[:1])
    assert abs(off[-1] - plain[-1]) > 1e-3


def test_the_first_match_wins_and_decay_has_the_factor():
    params = {"x": {"lora": {"a": jnp.ones(2), "b": jnp.ones(2)}}, "bias": jnp.ones(2)}
    made = optimizers.make(
        schedule=RATE,
        weight_decay=0.5,
        no_decay=["bias"],
        factors={"lora/b": 16.0, "lora": 2.0},
        clip=None,
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = made.update(zero, made.init(params), params)
    got = {path: float(x[0]) for path, x in tree.flatten(updates).items()}
    assert got == pytest.approx({"x/lora/a": -0.01, "x/lora/b": -0.08, "bias": 0.0})


def test_lion_goes_by_signs():
    """Chen et al., 2023 (https://arxiv.org/abs/2302.06675), algorithm 2: a step of the rate, and decay."""
    params, slope = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([1e-3, -5.0])}
    made = optimizers.make(name="lion", schedule=RATE, weight_decay=0.5, b2=0.95, clip=None)
    updates, _ = made.update(slope, made.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.01 * (1 + 0.5), 0.01 * (1 - 0.5 * 2)], atol=1e-7)


@pytest.mark.parametrize("key, value", [("factors", (("lora/c$", 2.0),)), ("no_decay", ("lora/c$",))])
def test_a_pattern_that_matches_nothing(key, value):
    made = optimizers.make(schedule=RATE, **{key: value})
    with pytest.raises(ValueError, match=f"optimizer.{key}: 'lora/c\\$' is found in no trainable leaf's path"):
        made.init({"lora": {"a": jnp.ones(2)}})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("learning_rate", -0.1, "a number of 0 or more"),
        ("learning_rate", None, "a number of 0 or more"),
        ("warmup_steps", -5, "a number of 0 or more"),
        ("clip", -1.0, "a number of 0 or more"),
        ("b1", 1.5, "below 1"),
        ("no_decay", "/b$", "several in brackets"),
        ("factors", (("b$", "16"),), "is no (regex, factor)"),
        ("factors", ("b$",), "is no (regex, factor)"),
    ],
)
def test_numbers_that_cannot_be(key, value, says):
    config = {**recipe.load("default").to_dict()["optimizer"], key: value}
    with pytest.raises(ValueError, match=f"config.optimizer.{key}.*{re.escape(says)}"):
        optimizers.from_config(config, steps=10, method=lora(rank=1), sites=tiny.found())


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_decay_of_those_that_know_none(name):
    with pytest.raises(ValueError, match=f"optimizer.weight_decay=0.1: {name} knows no weight decay"):
        optimizers.make(name=name, schedule=RATE, weight_decay=0.1)
    with pytest.raises(ValueError, match="optimizer.no_decay"):
        optimizers.make(name=name, schedule=RATE, no_decay=("bias",))


def test_patterns_from_the_command_line():
    overrides = [("optimizer.factors", "{'/lora/.*/b$': 16}"), ("optimizer.no_decay", "['/bias$']")]
    config = recipe.load("default", overrides).to_dict()["optimizer"]
    assert config["factors"] == (("/lora/.*/b$", 16),) and config["no_decay"] == ("/bias$",)


# --- LoRA-FA --------------------------------------------------------------------------------------


def test_freeze_a_trains_b_alone():
    method = lora(rank=3, freeze_a=True, init="pissa")
    frozen, trainable = method.init(jax.random.key(0), tiny.params(), tiny.found())
    assert {p.rsplit("/", 1)[1] for p in tree.flatten(trainable)} == {"b"}
    assert {p.rsplit("/", 1)[1] for p in tree.flatten(frozen) if "/lora/" in p} == {"a", "scale", "a0", "b0"}
    with pytest.raises(ValueError, match="nothing to learn on an embedding"):
        lora(freeze_a=True, targets=["embed_tokens"]).init(jax.random.key(0), tiny.params(), tiny.found())


def test_lora_fa_by_hand():
    """A = [[2], [0]], s = 3: AᵀA = 4, so that g = 36 becomes 1; the first step of Adam is its sign."""
    frozen = {"x": {"lora": {"default": {"a": jnp.array([[2.0], [0.0]]), "scale": jnp.float32(3.0)}}}}
    params = {"x": {"lora": {"default": {"b": jnp.zeros((1, 2))}}}}
    made = optimizers.make(name="lora_fa", schedule=RATE, eps=1.0, clip=None)
    grads = jax.tree.map(lambda x: jnp.array([[36.0, -72.0]]), params)
    updates, state = made.update(grads, made.init(params), params, frozen=frozen)
    mean = tree.flatten(state[1].mean)["x/lora/default/b"]
    np.testing.assert_allclose(mean, [[0.1, -0.2]], rtol=1e-6)
    u = tree.flatten(updates)["x/lora/default/b"]
    size = 0.01 * np.sqrt(0.001) / 0.1  # eps stands beside sqrt(v) = sqrt(0.001) |g|
    g = np.array([[1.0, -2.0]])
    np.testing.assert_allclose(u, -size * 0.1 * g / (np.sqrt(0.001) * np.abs(g) + 1.0), rtol=1e-5)


def test_lora_fa_learns():
    losses, _ = run(lora(rank=3, freeze_a=True), name="lora_fa", steps=10)
    assert losses[-1] < 0.9 * losses[0]


def test_lora_fa_wants_a_frozen():
    made = optimizers.make(name="lora_fa", schedule=RATE)
    with pytest.raises(ValueError, match="would train; set config.method.freeze_a=True"):
        made.init({"x": {"lora": {"default": {"a": jnp.ones(2)}}}})
