"""Rows of one batch through different adapters, against each adapter alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import adapters as values
from peftax.core import injection, tree
from peftax.core.method import Ctx, chain
from peftax.methods.lora import lora
from peftax.mixed_batch import mixed_batch
from peftax.train.generate import Generator
from tests.core import toys
from tests.methods import tiny

SETTINGS = [
    ("lora", dict(rank=1, alpha=3.0, targets=["o_proj"])),
    ("lora", dict(rank=2, targets=["q_proj", "v_proj"], layers=[1])),
    ("lora", dict(rank=3, rank_pattern={"0.mlp.up_proj": 5})),
    ("lora", dict(rank=4, targets=["embed_tokens", "down_proj"])),
    ("lora", dict(rank=2, targets=["lm_head", "k_proj"], rank_stabilized=True)),
    ("lora", dict(rank=6, targets=["gate_proj"], alpha=1.0)),
    ("dora", dict(rank=2, targets=["q_proj", "o_proj"])),
    ("dora", dict(rank=3, layers=[0])),
]


@functools.cache
def adapters(kind="all"):
    made = []
    for i, (name, settings) in enumerate(SETTINGS if kind == "all" else SETTINGS[:6]):
        method = tiny.method(name, **settings)
        part = jax.jit(lambda p, m=method, i=i: m.init(jax.random.key(i), p, tiny.found()))(tiny.params())
        part = part._replace(trainable=tiny.perturb(part.trainable, i))
        numbers = values.layers(method, part, tiny.found())
        made.append((method, values.filled(method, part, tiny.found(), numbers)))  # noise in the padding goes
    return made


@functools.cache
def alone(kind, tokens):
    """Logits of the same tokens through each adapter, and through none."""
    ids = jnp.asarray(np.random.default_rng(0).integers(1, 37, (10, tokens)), jnp.int32)
    runs = [injection.inject(tiny.model().apply, m)({"params": tree.merge(*p)}, ids) for m, p in adapters(kind)]
    return ids, np.stack([*runs, tiny.model().apply({"params": tiny.params()}, ids)])


@pytest.mark.parametrize("kind, tokens", [("all", 1), ("all", 40), ("lora", 1), ("lora", 40)])
def test_every_row_is_as_its_adapter_alone(kind, tokens):
    """One token takes the products of all ranks, forty each row's own: one program for any choice of rows."""
    ids, expect = alone(kind, tokens)
    n = len(expect) - 1
    method, part = mixed_batch(adapters(kind), tiny.found())
    assert not tree.flatten(part.trainable)
    run = jax.jit(lambda p, w: injection.inject(tiny.model().apply, method)({"params": p}, ids, ctx=Ctx(adapters=w)))
    rng, params = np.random.default_rng(1), tree.merge(*part)
    for which in ([*range(n), -1, 0][:10], [-1] * 10, [n - 1] * 10, rng.integers(-1, n, 10)):
        which = np.resize(which, 10).astype(np.int32)
        got = run(params, which)
        assert tiny.distance(got, expect[which, np.arange(10)]) <= 1e-5
    assert run._cache_size() == 1
    apart = [np.abs(expect[i, :, -1] - expect[j, :, -1]).max() for i in range(n + 1) for j in range(i)]
    assert min(apart) > 1e-3


def test_generation():
    """Prompts of unlike lengths, each through its own adapter, as through that adapter alone."""
    prompts, which = [[3, 5, 7], [3, 5, 7], [9, 2], [3, 5, 7, 1]], [2, -1, 5, 2]
    options = dict(max_new_tokens=4, eos_ids=(), batch_size=4, bucket=4)
    method, part = mixed_batch(adapters("lora"), tiny.found())
    write = Generator(injection.inject(tiny.model().apply, method), tiny.model().init_cache, **options)
    got = write(tree.merge(*part), prompts, adapters=which)
    for i, k in enumerate(which):
        one, own = adapters("lora")[k] if k >= 0 else (chain(), (tiny.params(), {}))
        alone = Generator(injection.inject(tiny.model().apply, one), tiny.model().init_cache, **options)
        assert alone(tree.merge(*own), [prompts[i]]) == [got[i]]
    assert got[0] != got[1]
    with pytest.raises(ValueError, match="3 adapters for 4 prompts"):
        write(tree.merge(*part), prompts, adapters=[0, 1, 2])


def test_nothing_is_padded():
    """A site holds the ranks of those that target it; a stack those of its fullest layer."""
    _, part = mixed_batch(adapters("lora"), tiny.found())
    shapes = {p: x.shape for p, x in tree.flatten(part.frozen).items() if p.endswith("/a")}
    layers = "model/layers"
    assert shapes[f"{layers}/self_attn/q_proj/mixed/default/a"] == (2, 2 + 3, 24)
    assert shapes[f"{layers}/mlp/up_proj/mixed/default/a"] == (2, 5, 24)
    assert shapes["model/embed_tokens/mixed/default/a"] == (4, 37)


def test_convolutions_and_packed_rows():
    model, params, x, all_sites = toys.found("cnn")
    several = []
    for seed, settings in enumerate([dict(rank=2, targets=["first", "head"]), dict(rank=3, targets=["second"])]):
        method = lora(**settings)
        part = toys.start(method, params, all_sites, seed)
        several.append((method, part._replace(trainable=toys.perturb(part.trainable, seed))))
    expect = [toys.run(model, m, tree.merge(*p), x) for m, p in several]
    method, part = mixed_batch(several, all_sites)
    got = toys.run(model, method, tree.merge(*part), x, ctx=Ctx(adapters=jnp.array([1, 0])))
    toys.close(got, jnp.stack([expect[1][0], expect[0][1]]), 1e-5)


def test_refusals():
    model, params, x, all_sites = toys.found("mlp")
    method = lora(rank=2)
    made = [(method, toys.start(method, params, all_sites))]
    mixed, part = mixed_batch(made, all_sites)
    merged = tree.merge(*part)
    with pytest.raises(ValueError, match="not given; call with ctx"):
        toys.run(model, mixed, merged, x)
    with pytest.raises(ValueError, match="names 3 rows and the site is given"):
        toys.run(model, mixed, merged, x, ctx=Ctx(adapters=jnp.zeros(3, jnp.int32)))
    with pytest.raises(ValueError, match="is float32"):
        toys.run(model, mixed, merged, x, ctx=Ctx(adapters=jnp.zeros(2)))
    with pytest.raises(ValueError, match="no adapters"):
        mixed_batch([], all_sites)
    other = tiny.method("ia3", targets=["up"], feedforward=())
    with pytest.raises(ValueError, match="'ia3' is neither.*combination.convert"):
        mixed_batch([(other, toys.start(other, params, all_sites))], all_sites)
    biased = lora(rank=2, b_bias=True)
    with pytest.raises(ValueError, match="lora 'default' holds 'c' at .*would be lost; fold it"):
        mixed_batch([*made, (biased, toys.start(biased, params, all_sites))], all_sites)
    _, params, _, all_sites = toys.found("tied")
    rows = lora(rank=2, tokens=(1, 2))
    with pytest.raises(ValueError, match="holds 'ids' at 'embed'"):
        mixed_batch([(rows, toys.start(rows, params, all_sites))], all_sites)
    _, params, _, all_sites = toys.found("bank")
    with pytest.raises(ValueError, match="stack of experts"):
        mixed_batch([(method, toys.start(method, params, all_sites))], all_sites)
