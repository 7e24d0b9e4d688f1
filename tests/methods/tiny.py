"""A tiny Llama whose sizes are all different, with biases, grouped heads and odd numbers."""

import functools
import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftax import methods, models
from peftax.core import sites, tree
from peftax.data.chat import Example
from peftax.data.packing import pack, pad
from peftax.train.step import State

LAYERS = 2
CONFIG = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 41,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
}
LENGTH = 22


@functools.cache
def model(scan=True, remat="none"):
    return models.build(CONFIG, scan=scan, remat=remat)


def method(name, *, sizes="SMALL", **settings):
    """A method with its defaults, or what its own test says for small sizes: SMALL (this model), TOY (a few units)."""
    at = f"tests.methods.{name}_test"
    fits = getattr(importlib.import_module(at), sizes, {}) if importlib.util.find_spec(at) else {}
    return methods.make(name, **{**fits, **settings})


@functools.cache
def found(scan=True):
    """Sites from shapes alone."""
    shapes = models.abstract(model(scan))
    return sites.find(model(scan).apply, shapes, jax.ShapeDtypeStruct((1, 3), jnp.int32))


@functools.cache
def params(scan=True):
    """Random weights, other ones in every layer; numpy draws them without a compile."""
    if not scan:
        return unstack(params())
    rng = np.random.default_rng(0)
    flat = {}
    for path, shape in tree.flatten(models.abstract(model())).items():
        leaf = path.rsplit("/", 1)[1]
        size = {"kernel": 1 / np.sqrt(shape.shape[-2:][0]), "embedding": 1.0}.get(leaf, 0.1)
        if path == "lm_head/kernel":
            size *= 2  # a fixed small head would bound how far the loss can fall
        centre = 1.0 if leaf == "scale" else 0.0
        flat[path] = jnp.asarray(rng.normal(centre, size, shape.shape), jnp.float32)
    return tree.unflatten(flat)


def unstack(scanned):
    """A tree of the scanned model -> the same tree with numbered layers."""
    flat = {}
    for path, leaf in tree.flatten(scanned).items():
        if path.startswith("model/layers/"):
            for i in range(LAYERS):
                flat[path.replace("layers/", f"layers/{i}/", 1)] = leaf[i]
        else:
            flat[path] = leaf
    return tree.unflatten(flat)


def perturb(trainable, seed=1, zero=0.3):
    """Noise of the leaf's own size (`zero` where it is zero): away from the identity, unlike in every layer."""
    rng = np.random.default_rng(seed)

    def noisy(x):
        size = float(np.sqrt(np.mean(np.square(x)))) or zero
        return x + jnp.asarray(rng.normal(0, size, x.shape), x.dtype)

    return jax.tree.map(noisy, trainable)


def either() -> optax.GradientTransformation:
    """SGD, or Adam where its state says so, at the rate that stands there: one program for all.

    Keeps the gradient, and clips it as a run does by default.
    """
    clip, moments = optax.clip_by_global_norm(1.0), optax.scale_by_adam()

    def init(trainable):
        kept = {"moments": moments.init(trainable), "gradient": optax.tree.zeros_like(trainable)}
        return {"adam": jnp.bool_(False), "rate": jnp.float32(0), **kept}

    def update(gradient, state, trainable):
        clipped, _ = clip.update(gradient, clip.init(trainable))
        scaled, new = moments.update(clipped, state["moments"], trainable)
        steps = jax.tree.map(lambda a, b: -state["rate"] * jnp.where(state["adam"], a, b), scaled, clipped)
        return steps, {**state, "moments": new, "gradient": gradient}

    return optax.GradientTransformation(init, update)


def begin(trainable, optimizer, *, adam, rate):
    """The first state of training with `either`, also where a method wraps it; the state may be donated."""
    state = State.create(jax.tree.map(jnp.copy, trainable), optimizer)
    own(state).update(adam=jnp.bool_(adam), rate=jnp.float32(rate))
    return state


def own(state):
    """What `either` holds in a state."""
    return getattr(state.opt_state, "inner", state.opt_state)


@functools.cache
def examples():
    """Eight, of 4 to 11 tokens, with completions of 1 to 7."""
    rng = np.random.default_rng(2)
    made = []
    for i in range(8):
        n = 4 + i
        tokens = rng.integers(1, CONFIG["vocab_size"], n).astype(np.int32)
        weights = (np.arange(n) >= n - 1 - (5 * i + 2) % 7).astype(np.float32)
        made.append(Example(tokens, weights))
    return made


def batch():
    """One example a row."""
    return pad(examples(), LENGTH)


def packed():
    """The same examples in fewer rows, then rows of padding: the batch keeps its shape."""
    rows = pack(examples(), LENGTH)
    assert len(rows["tokens"]) < 8
    return {k: np.pad(v, ((0, 8 - len(v)), (0, 0))) for k, v in rows.items()}


def distance(a, b):
    """The largest difference relative to the largest value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / max(np.abs(a).max(), np.abs(b).max(), 1e-30))


def close(a, b, tolerance):
    """Leaf by leaf."""
    a, b = tree.flatten({"": a}), tree.flatten({"": b})
    assert a.keys() == b.keys()
    worst = max(a, key=lambda path: distance(a[path], b[path]))
    assert distance(a[worst], b[worst]) <= tolerance, f"{worst}: {distance(a[worst], b[worst]):.1e}"
