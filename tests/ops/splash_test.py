"""Splash attention, interpreted, against XLA's: numbers and gradients of rows as training packs them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding

from peftax import methods, models, sharding
from peftax.core import injection, sites, tree
from peftax.ops.attention import EVERYWHERE, Where, attention, splash, xla
from peftax.train import loss
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
    ours = jax.jit(functools.partial(slopes, lambda *a: splash.attention(*a, where, window=window, interpret=True), where))
    plain = jax.jit(functools.partial(slopes, lambda *a: xla.attention(*a, where, window=window, in_order=True), where))
    (value, found), (wanted, theirs) = ours(*given), plain(*given)
    assert abs(value - wanted) < 1e-4 * abs(wanted) + 1e-3
    for a, b in zip(found, theirs, strict=True):
        assert distance(a, b) < 1e-5
