"""One Dense layer with small numbers, for sums that can be done by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from peftax.core import injection, sites, tree

X = jnp.array([[1.0, 2.0]])
W, B = jnp.array([[1.0, 0.0, 1.0], [2.0, 2.0, 0.0]]), jnp.ones(3)  # X W + B = [6, 5, 2]
MODEL = nn.Sequential([nn.Dense(3)])  # its site is layers_0
PARAMS = {"layers_0": {"kernel": W, "bias": B}}


def outcome(method, leaves, shared=None):
    """(y, folded kernel, folded bias) with these trainable leaves at the site, and these shared ones."""
    found = sites.find(MODEL.apply, PARAMS, X)
    frozen, trainable = method.init(jax.random.key(0), PARAMS, found)
    merged = tree.flatten(tree.merge(frozen, trainable))
    for leaf, value in leaves.items():
        path = f"layers_0/{method.name}/default/{leaf}"
        assert merged[path].shape == value.shape
        merged[path] = value
    for leaf, value in (shared or {}).items():
        path = f"{method.name}/default/{leaf}"
        assert merged[path].shape == value.shape
        merged[path] = value
    merged = tree.unflatten(merged)
    y = injection.inject(MODEL.apply, method)({"params": merged}, X)
    folded = method.fold(merged, found)["layers_0"]
    return y.tolist(), folded["kernel"].tolist(), folded["bias"].tolist()
