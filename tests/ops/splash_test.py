"""Splash attention, interpreted, against XLA's: numbers and gradients of rows as training packs them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex
from jax.sharding import NamedSharding

from peftax import methods, models, sharding
from peftax.core import injection, sites, tree
from peftax.machines import cost
from peftax.ops.attention import EVERYWHERE, Where, attention, splash, xla
from peftax.train import loss, setup
from peftax.weights.outlines import Outline
from tests.methods.tiny import distance

SIZE = 64


def packed(t, *, before=0, inside=0):
    """Two rows of segments and padding; `before` keys that are in no row and `inside` tokens of it are seen by all."""
    segments = np.zeros((2, t), np.int32)
    positions = np.zeros((2, t), np.int32)
    for row, ends in enumerate([(t // 3, t // 2, t - 5), (t,)]):
        at = inside
        for number, end in enumerate(ends, 1):
            segments[row, at:end], positions[row, at:end] = number, np.arange(end - at) + before + inside
            at = end
    segments[:, :inside], positions[:, :inside] = EVERYWHERE, before + np.arange(inside)
    front = [np.broadcast_to(x, (2, before)).astype(np.int32) for x in (np.arange(before), EVERYWHERE)]
    keys = [np.concatenate(x, axis=1) for x in zip(front, (positions, segments), strict=True)]
    return Where(*map(jnp.asarray, (positions, segments, *keys)), front=before + inside)


def arrays(t, s, heads, kv, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, t, heads, SIZE), *[(2, kv, s, SIZE)] * 2
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def slopes(attend, where, *given):
    counts = (where.q_segments != 0)[..., None, None]
    return jax.value_and_grad(lambda *a: jnp.sum(jnp.where(counts, jnp.sin(attend(*a)), 0)), (0, 1, 2))(*given)


CASES = {  # tokens, keys before them, virtual tokens among them, heads, key heads, window
    "whole blocks": (256, 0, 0, 2, 2, None),
    "ragged, grouped heads": (333, 0, 0, 4, 2, None),
    "shorter than a block": (40, 0, 0, 2, 1, None),
    "a window": (700, 0, 0, 2, 1, 100),
    "a prefix": (260, 7, 0, 2, 1, None),
    "a prompt": (300, 0, 9, 2, 1, None),
    "both": (640, 5, 9, 2, 2, None),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_xla(case):
    t, before, inside, heads, kv, window = CASES[case]
    where, given = packed(t, before=before, inside=inside), arrays(t, t + before, heads, kv)
    assert splash.refusal(SIZE, t + before, where.front, window) is None

    @functools.partial(jax.jit, static_argnums=0)
    def run(form, *given):
        how = {"interpret": True} if form is splash else {"in_order": True}
        return slopes(lambda *a: form.attention(*a, where, window=window, **how), where, *given)

    (value, found), (wanted, theirs) = run(splash, *given), run(xla, *given)
    assert abs(value - wanted) < 1e-4 * abs(wanted) + 1e-3
    for a, b in zip(found, theirs, strict=True):
        assert distance(a, b) < 1e-5


LLAMA = {
    **{"model_type": "llama", "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": SIZE},
}


@pytest.fixture
def interpreted(monkeypatch):
    """Counts how often Splash is traced."""
    traced = []

    def attend(*args, real=splash.attention, **more):
        traced.append(more["first"])
        return real(*args, **more, interpret=True)

    monkeypatch.setattr(splash, "attention", attend)
    return traced


def gradients(form, method, batch, *, remat="dots", grid=None, members=0):
    """Of a model's trainable leaves: on one device, on a mesh, or of several members of one base."""
    model = models.build(LLAMA, remat=remat, attention=form)
    params = models.abstract(model)
    found = sites.find(model.apply, params, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    part = method.init(jax.random.key(1), params, found)
    theta = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), part.trainable)
    rows = None if grid is None else NamedSharding(sharding.make_mesh(**grid), sharding.BATCH)
    apply = injection.inject(model.apply, method, rows=rows)

    def total(theta, frozen):
        return loss.causal_lm(apply, tree.merge(frozen, theta), batch, chunk=32)[0]

    run = jax.grad(total)
    if members:
        theta = jax.tree.map(lambda x: jnp.stack([x * i for i in range(members)]), theta)
        run = jax.vmap(run, (0, None))
    return jax.jit(run)(theta, part.frozen)


def batch_of(t):
    where, tokens = packed(t), jax.random.randint(jax.random.key(3), (2, t), 0, LLAMA["vocab_size"])
    weights = (where.q_segments > 0).astype(jnp.float32)
    names = {"positions": where.q_positions, "segment_ids": where.q_segments, "weights": weights}
    return {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1), **names}


LORA = {"rank": 4, "targets": ("q_proj", "v_proj")}
RUNS = {  # method, its settings, how
    "members of one base, layers made again": ("lora", LORA, {"members": 2, "remat": "full"}),
    "a prompt": ("prompt", {"length": 5}, {}),
    "rows and heads on a mesh": ("lora", LORA, {"grid": {"data": 2, "fsdp": 1, "tensor": 4}}),
    "a prefix and tokens on a mesh": ("prefix", {"length": 5}, {"grid": {"data": 1, "fsdp": 2, "sequence": 4}}),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_model_trains_alike(case, interpreted):
    name, settings, how = RUNS[case]
    method, batch = methods.make(name, **settings), batch_of(256)
    ours = gradients("splash", method, batch, **how)
    assert interpreted
    assert all((first is not None) == ("tokens" in case) for first in interpreted)
    theirs = gradients("xla", method, batch, **how)
    for path, x in tree.flatten(theirs).items():
        assert distance(tree.flatten(ours)[path], x) < 2e-5, path


def test_what_it_keeps_bears_a_name():
    """Remat "dots" keeps the output and one number a query; the backward pass does not attend again."""
    where, (q, k, v) = packed(256), arrays(256, 256, 2, 1)

    def attend(q, k, v):
        return splash.attention(q, k, v, where, interpret=True)

    policy = jax.checkpoint_policies.save_only_these_names("attention")
    jaxpr = jax.make_jaxpr(jax.grad(lambda *a: jax.checkpoint(attend, policy=policy)(*a).sum(), (0, 1, 2)))(q, k, v)
    assert list(primitives(jaxpr.jaxpr)).count("pallas_call") == 3  # forward, dq, dk and dv


def primitives(jaxpr):
    """Of all that has results: the rest no compiler keeps."""
    for equation in (e for e in jaxpr.eqns if e.outvars):
        yield equation.primitive.name
        if equation.primitive.name != "pallas_call":
            for inner in jex.jaxprs_in_params(equation.params):
                yield from primitives(inner)


def test_what_it_does_not_take_xla_makes():
    where, (q, k, v) = packed(64), arrays(64, 64, 2, 1)
    with pytest.warns(UserWarning, match="layers that see differently far; XLA makes it"):
        y = attention(q, k, v, where, window=jnp.int32(9), in_order=True, form="splash")
    assert jnp.array_equal(y, attention(q, k, v, where, window=jnp.int32(9), in_order=True))
    assert splash.refusal(80, 64, 0, None) == "heads of 80 numbers; want 64 or 128"
    assert splash.refusal(64, 64, 3, 9) == "virtual tokens and a window"
    assert splash.refusal(64, 1 << 16, 3, None) == "virtual tokens before more than 65,408 keys"
    cached = attention(q, k, v, where, form="splash")
    assert jnp.array_equal(cached, attention(q, k, v, where))


def test_another_device_goes_on_with_xla(caplog):
    base = setup.outline(path="tiny", attention="splash", files=Outline("tiny", LLAMA))
    assert base.model.config.attention == "xla"
    assert "is for TPU, this is cpu" in caplog.text


def test_its_operations_are_counted():
    """Scores and their product with values, of all blocks; going back three products for dq and four for dk and dv."""
    where, given = packed(1024), arrays(1024, 1024, 4, 2)

    def attend(*given):
        return splash.attention(*given, where).sum()

    one = 2 * 2 * 4 * 1024 * 1024 * SIZE
    assert cost.flops(jax.jit(attend).trace(*given)) == 2 * one
    assert cost.flops(jax.jit(jax.grad(attend, (0, 1, 2))).trace(*given)) == pytest.approx(9 * one, rel=1e-3)
