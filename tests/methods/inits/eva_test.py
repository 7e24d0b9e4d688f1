"""EVA: the statistics of what sites are given, from inside a scanned model."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import injection, sites, tree
from peftax.methods.inits import eva
from peftax.methods.lora import lora
from peftax.train import loss
from tests.methods import tiny

TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]


def found(scan=True, batches=1, init_scale=1.0, **settings):
    method = lora(rank=3, alpha=6.0, targets=TARGETS, init="eva", init_scale=init_scale)
    batch = tiny.batch()
    return method, eva.calibrate(
        lambda apply, params, batch: loss.causal_lm(apply, params, batch, chunk=8)[0],
        functools.partial(injection.inject, tiny.model(scan).apply),
        method,
        tiny.params(scan),
        tiny.found(scan),
        [(batch, batch["weights"] > 0)] * batches,
        **settings,
    )


def principal(x, mask, n):
    x = np.asarray(x, np.float64)[np.asarray(mask)]
    _, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return vt[:n].T, s**2 / (s**2).sum()


def test_directions_are_those_of_the_tokens_that_count():
    _, got = found()
    batch = tiny.batch()
    params = tiny.params()["model"]
    x = params["embed_tokens"]["embedding"][batch["tokens"]]
    size = params["layers"]["input_layernorm"]["scale"][0]
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * size[None, None]
    name = "model.layers.0.self_attn.q_proj"
    expected, _ = principal(x, batch["weights"] > 0, got.ranks[name])
    np.testing.assert_allclose(np.abs(got.a[name].T @ expected), np.eye(got.ranks[name]), atol=1e-3)


def test_ranks_go_where_they_explain_most():
    method, got = found()
    assert sum(got.ranks.values()) == 3 * 8 and max(got.ranks.values()) <= 6
    assert len(set(got.ranks.values())) > 2
    settings = got.settings(method)
    for name, rank in got.ranks.items():
        if rank not in (0, 3):
            assert settings["rank_pattern"][name] == rank and settings["alpha_pattern"][name] == 2.0 * rank
    _, flat = found(rho=1.0)
    assert set(flat.ranks.values()) == {3}


def test_scanned_and_unrolled_agree():
    (_, a), (_, b) = found(), found(scan=False)
    assert a.ranks == b.ranks
    for name, x in a.a.items():
        np.testing.assert_allclose(np.abs((x * b.a[name]).sum(0)), np.ones(x.shape[1]), atol=1e-3)


def test_a_start_of_another_size():
    (_, one), (_, three) = found(), found(init_scale=3.0)
    for name, a in one.a.items():
        np.testing.assert_allclose(three.a[name], 3 * a, rtol=1e-6)


def test_stops_when_nothing_moves():
    assert found(batches=4)[1].batches == 2
    assert found(batches=4, tau=None)[1].batches == 4


def test_fill_begins_as_the_untouched_model():
    method, got = found()
    adapted = lora(**got.settings(method))
    part = eva.fill(adapted.init(jax.random.key(0), tiny.params(), tiny.found()), got, tiny.found())
    batch = tiny.batch()
    inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
    logits = injection.inject(tiny.model().apply, adapted)({"params": tree.merge(*part)}, *inputs)
    plain = tiny.model().apply({"params": tiny.params()}, *inputs)
    seen = batch["segment_ids"] > 0
    np.testing.assert_array_equal(np.asarray(logits)[seen], np.asarray(plain)[seen])


def test_a_rank_of_zero_is_no_target():
    got = eva.Found({}, {"layers_0": 0, "layers_2": 4}, 1)
    assert got.settings(lora(rank=2))["exclude"] == ("layers_0",)
    assert got.settings(lora(rank=2, exclude="x.*"))["exclude"] == "(?:x.*)|layers_0"


def test_wide_sites_are_seen_through_a_sketch():
    """200 inputs, 4 · 2 · 2 + 16 = 32 columns: the same directions to 1e-3 where the spectrum falls."""
    model = nn.Sequential([nn.Dense(5)])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 50, 200)) @ (0.8 ** np.arange(200)[:, None] * np.linalg.qr(rng.normal(size=(200, 200)))[0])
    x, mask = jnp.asarray(x + 1.0, jnp.float32), jnp.ones((6, 50), bool)
    params = model.init(jax.random.key(0), x)["params"]
    got = eva.calibrate(
        lambda apply, params, x: apply({"params": params}, x).sum(),
        functools.partial(injection.inject, model.apply),
        lora(rank=2, targets=["layers_0"]),
        params,
        sites.find(model.apply, params, x),
        [(x, mask)],
    )
    expected, _ = principal(x, mask, 2)
    np.testing.assert_allclose(np.abs(got.a["layers_0"].T @ expected), np.eye(2), atol=5e-3)


def test_refusals():
    with pytest.raises(ValueError, match="rho 0.5"):
        found(rho=0.5)
    with pytest.raises(ValueError, match="no batch"):
        found(batches=0)
