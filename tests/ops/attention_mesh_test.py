"""Attention by eight devices' parts: the numbers and gradients of one device, and what moves."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from peftax import sharding
from peftax.ops.attention import Where, attention
from peftax.ops.attention.mesh import splits
from tests.methods.tiny import distance
from tests.ops.quantized_test import moved, sized

B, T, H = 4, 8, 16


def inputs(n, kv, front=0, rows=None):
    """q, k, v and where: two segments a row, the second row padded, `front` keys before all."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, T, n, H), *[(B, kv, front + T, H)] * 2))
    segments = np.ones((B, T), np.int32)
    segments[:, 5:], segments[1, 6:] = 2, 0
    positions = np.where(segments == 2, np.arange(T) - 5, np.arange(T)).astype(np.int32) + front
    before = [np.broadcast_to(x, (B, front)).astype(np.int32) for x in (np.arange(front), -1)]
    keys = [np.concatenate([a, b], axis=1) for a, b in zip(before, (positions, segments), strict=True)]
    return q, k, v, Where(*map(jnp.asarray, (positions, segments, *keys)), rows=rows)


CASES = {  # mesh, heads, key heads, keys in front
    "heads over tensor": ({"data": 2, "fsdp": 1, "tensor": 4}, 8, 4, 0),
    "a key head on two devices": ({"data": 2, "fsdp": 1, "tensor": 4}, 8, 2, 0),
    "heads that tensor does not divide": ({"data": 2, "fsdp": 1, "tensor": 4}, 6, 3, 0),
    "tokens over sequence": ({"data": 1, "fsdp": 4, "sequence": 2}, 4, 2, 0),
    "both": ({"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}, 4, 2, 0),
    "both, and keys in front": ({"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}, 4, 1, 3),
    "tokens that sequence does not divide": ({"data": 1, "fsdp": 1, "sequence": 8}, 2, 1, 0),
}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("case", CASES)
def test_equals_one_device(case, window):
    grid, n, kv, front = CASES[case]
    rows = NamedSharding(sharding.make_mesh(**grid), sharding.BATCH)
    q, k, v, where = inputs(n, kv, front)
    counts = (where.q_segments > 0)[:, :, None, None]

    def loss(q, k, v, where):
        y = attention(q, k, v, where, window=window, in_order=True)
        return jnp.sum(jnp.where(counts, jnp.sin(y), 0))

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    one, parted = run(q, k, v, where), run(*inputs(n, kv, front, rows))
    assert abs(one[0] - parted[0]) <= 1e-4  # of some hundred sines, which cancel
    for a, b in zip(one[1], parted[1], strict=True):
        assert distance(a, b) <= 2e-6


def test_keys_are_gathered_once_and_their_gradients_scattered():
    """Over sequence k and v of a device's rows and heads are gathered, no queries; dk and dv come back by parts."""
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, sequence=2)
    rows = NamedSharding(mesh, sharding.BATCH)
    q, k, v, where = inputs(4, 2, rows=rows)
    lies = [NamedSharding(mesh, jax.P("fsdp", *axes)) for axes in (("sequence", "tensor"), ("tensor", "sequence"))]

    def loss(q, k, v):
        return jnp.sum(jnp.sin(attention(q, k, v, where, in_order=True)))

    placed = jax.device_put((q, k, v), (lies[0], lies[1], lies[1]))
    step = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=(lies[0], lies[1], lies[1]))
    moving = moved(step.lower(*placed).compile().as_text())
    whole = math.prod((B // 2, 1, T, H))
    floats = {kind: [n for dtype, n in map(sized, shapes) if dtype == "f32"] for kind, shapes in moving.items()}
    assert [n for n in floats.pop("all-gather") if n] == [whole] * 2
    assert sum(floats.pop("reduce-scatter")) == whole  # two halves
    assert not any(map(sum, floats.values())), floats


def test_which_heads_are_split():
    assert splits(64, 8, 4) == (True, True)
    assert splits(64, 8, 16) == (True, False)  # Llama-3.1-70B over 16: each key head on two devices
    assert splits(9, 3, 2) == (False, False)
    assert splits(8, 8, 1) == (False, False)
