"""End to end through the public functions: a first script of a user, on any Python and JAX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftax
from peftax import methods, models
from peftax.train import loss, optimizers, step

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


class Classifier(nn.Module):
    """A user's own model, which knows nothing of peftax."""

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(24, name="up")(x))
        return nn.Dense(4, name="down")(x)


def train(apply, method, params, sites, objective, batch, steps):
    """(the losses, the frozen half as it was, the partition after `steps`)."""
    part = jax.jit(lambda p: method.init(jax.random.key(1), p, sites))(params)
    before = jax.tree.map(np.array, part.frozen)
    optimizer = optimizers.make(schedule=optimizers.schedule(learning_rate=0.03, steps=steps))
    state = step.State.create(part.trainable, optimizer)
    update = step.make_step(peftax.inject(apply, method), objective, optimizer)
    losses = []
    for _ in range(steps):
        state, metrics = update(state, part.frozen, batch)
        losses.append(float(metrics["loss"]))
    assert update._cache_size() == 1, "the step compiled more than once"
    return losses, before, peftax.Partition(part.frozen, state.trainable)


def check(apply, method, params, sites, losses, before, part, *args):
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.7 * losses[0], losses
    jax.tree.map(np.testing.assert_array_equal, part.frozen, before)
    merged = peftax.merge(part.frozen, part.trainable)
    trained = jax.jit(peftax.inject(apply, method))({"params": merged}, *args)
    plain = jax.jit(apply)
    base = plain({"params": params}, *args)
    folded = plain({"params": jax.jit(lambda p: method.fold(p, sites))(merged)}, *args)
    scale = np.abs(trained).max()
    assert np.abs(trained - base).max() > 0.05 * scale, "the adapter does nothing"
    np.testing.assert_allclose(folded, trained, rtol=0, atol=1e-5 * scale)


def test_own_model():
    model = Classifier()
    x = jax.random.normal(jax.random.key(0), (32, 12))
    labels = jax.random.randint(jax.random.key(2), (32,), 0, 4)
    params = model.init(jax.random.key(3), x)["params"]
    sites = peftax.find(model.apply, params, x)
    assert set(sites) == {"up", "down"}
    method = methods.make("lora", rank=4, alpha=8.0)

    def objective(apply, params, batch, ctx):
        logits = apply({"params": params}, batch["x"], ctx=ctx)
        picked = jnp.take_along_axis(nn.log_softmax(logits), batch["labels"][:, None], axis=-1)
        return -jnp.sum(picked), jnp.float32(picked.size)

    batch = {"x": x, "labels": labels}
    ran = train(model.apply, method, params, sites, objective, batch, steps=30)
    check(model.apply, method, params, sites, *ran, x)


@pytest.mark.parametrize("scan", [True, False])
def test_llama(scan):
    model = models.build(LLAMA, scan=scan)
    rows = np.random.default_rng(0).integers(1, 32, (4, 17), dtype=np.int32)
    tokens, targets = rows[:, :-1], rows[:, 1:]
    batch = {
        "tokens": tokens,
        "targets": targets,
        "weights": np.ones(tokens.shape, np.float32),
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape),
        "segment_ids": np.ones(tokens.shape, np.int32),
    }
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    sites = peftax.find(model.apply, params, tokens)
    method = methods.make("lora", rank=4, alpha=8.0)
    counts = peftax.count(method, params, sites)
    assert 0 < counts["trainable"] < counts["total"]
    ran = train(model.apply, method, params, sites, loss.causal_lm, batch, steps=40)
    check(model.apply, method, params, sites, *ran, tokens)
