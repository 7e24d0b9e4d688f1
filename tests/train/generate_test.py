import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax import methods, models
from peftax.core import injection, sites, tree
from peftax.methods.lora import lora
from peftax.train.generate import Generator, split_prefix

CONFIG = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(1, 31, n).tolist() for n in (3, 9, 1, 6, 12, 4, 5)]


@functools.cache
def tiny(scan=True, seed=0, **config):
    """A model whose random weights are large enough that its answers vary."""
    model = models.build(CONFIG | config, scan=scan)
    shapes = models.abstract(models.build(CONFIG | config))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), shapes)
    if not scan:
        params = dict(params, model=dict(params["model"]))
        stacked = params["model"]["layers"]
        params["model"]["layers"] = {str(i): jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(2)}
    return model, params


def generator(model, apply=None, **options):
    options = dict(max_new_tokens=6, eos_ids=(), batch_size=4, bucket=16) | options
    return Generator(apply or model.apply, model.init_cache, **options)


@functools.cache
def expected(seed=0):
    """Greedy, one prompt at a time, without cache or padding."""
    model, params = tiny(seed=seed)
    forward = jax.jit(model.apply)
    out = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(6):
            padded = jnp.asarray([ids + [0] * (18 - len(ids))])
            ids.append(int(jnp.argmax(forward({"params": params}, padded)[0, len(ids) - 1])))
        out.append(ids[len(prompt) :])
    return out


@pytest.mark.parametrize("scan", [True, False])
def test_greedy_equals_the_model_without_cache(scan):
    model, params = tiny(scan=scan)
    make = generator(model, bucket=8)
    assert make(params, PROMPTS) == expected()
    assert make.compiled() == 2  # batches padded to 16 and to 8


def test_padding_changes_nothing():
    model, params = tiny()
    for options in (dict(bucket=32, pad_id=9), dict(batch_size=7)):
        assert generator(model, **options)(params, PROMPTS) == expected(), options


@pytest.mark.parametrize("length", [1, 5])
def test_prefix_equals_whole_prompts(length):
    model, params = tiny()
    prefix = RNG.integers(1, 31, length).tolist()
    make = generator(model, bucket=32)
    assert make(params, PROMPTS, prefix=prefix) == make(params, [prefix + p for p in PROMPTS])


def test_ends_at_eos_and_leaves_it_out():
    model, params = tiny()
    eos = expected()[0][2], expected()[3][4]

    def cut(row):
        ends = [i for i, t in enumerate(row) if t in eos]
        return row[: ends[0]] if ends else row

    assert generator(model, eos_ids=eos)(params, PROMPTS) == [cut(r) for r in expected()]


def test_other_params_and_folded_weights_compile_nothing():
    model, params = tiny()
    make = generator(model)
    make(params, PROMPTS)
    programs = make.compiled()

    method = lora(rank=2, alpha=8.0)
    found = sites.find(model.apply, params, jnp.zeros((1, 2), jnp.int32))
    part = method.init(jax.random.key(0), params, found)
    theta = jax.tree.map(lambda x: x + jnp.asarray(RNG.normal(0, 0.5, x.shape), x.dtype), part.trainable)
    whole = tree.merge(part.frozen, theta)
    injected = generator(model, injection.inject(model.apply, method))(whole, PROMPTS)
    folded = make(method.fold(whole, found), PROMPTS)
    assert injected == folded != expected()
    assert make(tiny(seed=1)[1], PROMPTS) == expected(seed=1)
    assert make.compiled() == programs


@pytest.mark.parametrize("name", ["prompt", "prefix", "adapter"])
@pytest.mark.parametrize("before", [0, 3])
def test_what_stands_before_the_tokens_and_around_the_modules(name, before):
    """With a cache, padding and a common prefix, as without."""
    model, params = tiny()
    method = methods.make(name, **({} if name == "adapter" else {"length": 5}))
    found = sites.find(model.apply, params, jnp.zeros((1, 2), jnp.int32))
    part = method.init(jax.random.key(0), params, found)
    theta = jax.tree.map(lambda x: x + jnp.asarray(RNG.normal(0, 0.5, x.shape), x.dtype), part.trainable)
    whole = tree.merge(part.frozen, theta)
    apply = injection.inject(model.apply, method)
    prefix = RNG.integers(1, 31, before).tolist()
    made = generator(model, apply, front=method.front)(whole, PROMPTS, prefix=prefix)
    forward = jax.jit(lambda p, x: apply({"params": p}, x))
    for prompt, new in zip(PROMPTS, made, strict=True):
        ids = prefix + prompt
        for token in new:
            padded = jnp.asarray([ids + [0] * (21 - len(ids))])
            assert token == int(jnp.argmax(forward(whole, padded)[0, len(ids) - 1]))
            ids.append(token)
    assert made != expected()


def test_the_task_of_a_prompt_for_several():
    model, params = tiny()
    method, other = (methods.make("multitask_prompt", length=5, tasks=2, task=task) for task in (0, 1))
    part = method.init(jax.random.key(0), params, sites.find(model.apply, params, jnp.zeros((1, 2), jnp.int32)))
    whole = tree.merge(part.frozen, jax.tree.map(lambda x: x + RNG.normal(0, 1, x.shape).astype("f"), part.trainable))
    made = {}
    for key, m, more in (("own", method, {}), ("asked", method, {"task": 1}), ("set", other, {})):
        apply = injection.inject(model.apply, m)
        made[key] = generator(model, apply, front=m.front, **more)(whole, PROMPTS)
    assert made["asked"] == made["set"] != made["own"]


def test_sampling_follows_its_seed_not_its_batch():
    model, params = tiny()
    hot = dict(temperature=2.0, seed=3)
    make = generator(model, **hot)
    drawn = make(params, PROMPTS)
    assert drawn == generator(model, batch_size=3, **hot)(params, PROMPTS) != expected()
    make.seed = 4
    assert make(params, PROMPTS) != drawn


def test_samples_have_the_right_frequencies():
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.1]] * 4000))
    keys = jax.random.split(jax.random.key(0), 4000)
    model, _ = tiny()
    for options, want in (
        (dict(), [0.5, 0.25, 0.15, 0.1]),
        (dict(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (dict(top_p=0.6), [2 / 3, 1 / 3, 0, 0]),
        (dict(top_k=1), [1, 0, 0, 0]),
        (dict(top_p=1e-6), [1, 0, 0, 0]),
        (dict(top_p=0.8), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
    ):
        drawn = generator(model, temperature=1.0, **options)._pick(logits, keys)
        share = np.bincount(np.asarray(drawn), minlength=4) / 4000
        np.testing.assert_allclose(share, want, atol=0.03)


def test_errors_say_what_is_wrong():
    model, params = tiny()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generator(model)(params, [[1], []])
    with pytest.raises(ValueError, match="batch_size is 0"):
        generator(model, batch_size=0)
    with pytest.raises(ValueError, match="top_p 0"):
        generator(model, top_p=0)
    assert generator(model)(params, []) == []


def test_split_prefix():
    assert split_prefix([[1, 2, 3], [1, 2, 4, 5], [1, 2]]) == ([1], [[2, 3], [2, 4, 5], [2]])
    assert split_prefix([[1, 2], [3]]) == ([], [[1, 2], [3]])
    assert split_prefix([[1, 2]]) == ([1], [[2]])
    assert split_prefix([]) == ([], [])
