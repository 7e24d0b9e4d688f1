"""Chunked loss equals the loss of all logits at once, and never holds them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from peftax.ops.cross_entropy import chunked_nll, token_nll

B, T, D, V = 2, 11, 4, 13


def data():
    keys = jax.random.split(jax.random.key(0), 4)
    h, w = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = jnp.zeros((B, T)).at[0, 8:].set(1.0).at[1, 2].set(0.5)
    return h, w, targets, weights


def test_token_nll_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    np.testing.assert_allclose(token_nll(logits, jnp.array([1])), [np.log(4)], rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_equals_all_at_once(chunk):
    h, w, targets, weights = data()

    def chunked(h, w):
        return jnp.sum(chunked_nll(lambda h: h @ w, h, targets, weights, chunk=chunk) * weights)

    def whole(h, w):
        return jnp.sum(token_nll(h @ w, targets) * weights)

    for a, b in zip(
        jax.tree.leaves(jax.value_and_grad(chunked, (0, 1))(h, w)),
        jax.tree.leaves(jax.value_and_grad(whole, (0, 1))(h, w)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("t", "parts", "chunk"), [(8, 2, 4), (10, 2, 4), (11, 2, 4), (8, 4, 2)])
def test_chunks_of_a_row_in_parts(t, parts, chunk):
    """Each takes as much of every part; where they do not divide the row, or a chunk has less than a part each, too."""
    h, w, targets, weights = data()
    h, targets, weights = h[:, :t], targets[:, :t], weights[:, :t]
    seen = []

    def head(h):
        seen.append(h.shape[1])
        return h @ w

    nll = chunked_nll(head, h, targets, weights, chunk=chunk, parts=parts)
    np.testing.assert_allclose(nll, jnp.where(weights > 0, token_nll(h @ w, targets), 0), rtol=1e-5)
    assert set(seen) == {max(chunk, parts)}


def test_every_device_works_on_every_chunk():
    """On a row over two devices a chunk's logits are half on each, and no hidden state moves."""
    h, w, targets, weights = data()
    mesh = jax.make_mesh((2,), ("sequence",), devices=jax.devices()[:2])
    h, targets, weights = (
        jax.device_put(x[:, :8], NamedSharding(mesh, PartitionSpec(None, "sequence"))) for x in (h, targets, weights)
    )

    def total(h, w):
        return jnp.sum(chunked_nll(lambda h: h @ w, h, targets, weights, chunk=4, parts=2))

    text = jax.jit(jax.grad(total)).lower(h, w).compile().as_text()
    assert f"f32[{B},2,{V}]" in text and f"f32[{B},4,{V}]" not in text
    assert " all-gather" not in text and " all-to-all" not in text and " collective-permute" not in text


@pytest.mark.parametrize("trained", [0, 1, (0, 1)], ids=["h", "w", "both"])
def test_never_holds_all_logits_nor_a_kernel_per_chunk(trained):
    h, w, targets, weights = data()

    def total(h, w):
        return jnp.sum(chunked_nll(lambda h: h @ w, h, targets, weights, chunk=4))

    text = jax.jit(jax.grad(total, trained)).lower(h, w).compile().as_text()
    assert f"[{B},4,{V}]" in text or f"[{B * 4},{V}]" in text
    for shape in (f"[{B},{T},{V}]", f"[{B},12,{V}]", f"[{B * T},{V}]", f"[3,{B},4,{V}]", f"[3,{D},{V}]"):
        assert shape not in text


def test_logits_are_made_once_while_the_head_is_frozen():
    h, w, targets, weights = data()

    def products(trained):
        def total(h, w):
            return jnp.sum(chunked_nll(lambda h: h @ w, h, targets, weights, chunk=4))

        return str(jax.make_jaxpr(jax.grad(total, trained))(h, w)).count("dot_general")

    assert products(0) == 2  # logits, d_h
    assert products((0, 1)) == 4  # logits, again, d_h, d_w


def test_weighs_each_token_under_vmap():
    h, w, targets, weights = data()

    def total(h, scale):
        return jnp.sum(chunked_nll(lambda h: h @ w, h, targets, weights, chunk=4) * weights * scale)

    both = jax.vmap(jax.grad(total), (0, 0))(jnp.stack([h, 2 * h]), jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(both[1], jax.grad(total)(2 * h, 3.0), rtol=1e-5, atol=1e-6)


def test_nothing_counts_where_weights_are_zero():
    h, w, targets, weights = data()
    nll = chunked_nll(lambda h: h @ w, h, targets, weights, chunk=4)
    np.testing.assert_array_equal(nll == 0, weights == 0)


@pytest.mark.parametrize("trained", [False, True])
def test_a_head_is_told_the_chunks_number(trained):
    """Forward and, where the head trains, once more backward: head(h, i) = (i + 1) h w."""
    h, w, targets, weights = data()
    scale = 1.0 + jnp.arange(T) // 4

    def chunked(h, w):
        head = lambda h, i: (i + 1) * (h @ w)  # noqa: E731
        return jnp.sum(chunked_nll(head, h, targets, weights, chunk=4, numbered=True) * weights)

    def whole(h, w):
        return jnp.sum(token_nll(scale[None, :, None] * (h @ w), targets) * weights)

    ours, theirs = (jax.value_and_grad(f, (0, 1) if trained else 0)(h, w) for f in (chunked, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
