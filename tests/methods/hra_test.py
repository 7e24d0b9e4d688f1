import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import tree
from peftax.core.method import Ctx, Kernel
from peftax.methods.hra import hra
from tests.methods import hand, llama_3b, tiny


def test_by_hand():
    """[1, 2] off the plane of [1, 1] is [-2, -1]; then off that of [2, 0] it is [2, -1]; the other order differs."""
    leaves = {"u": jnp.array([[2.0, 0.0], [1.0, 1.0]])}
    y, kernel, _ = hand.outcome(hra(rank=2, targets=["layers_0"]), leaves)
    np.testing.assert_allclose(y, [[1.0, -1.0, 3.0]], atol=1e-6)
    np.testing.assert_allclose(kernel, [[-2.0, -2.0, 0.0], [1.0, 0.0, 1.0]], atol=1e-6)


def test_orthogonal_directions_by_hand():
    """Two orthogonal reflections of a plane turn it by half: x becomes -x."""
    leaves = {"u": jnp.array([[2.0, 0.0], [1.0, 1.0]])}
    y, kernel, _ = hand.outcome(hra(rank=2, gram_schmidt=True, targets=["layers_0"]), leaves)
    np.testing.assert_allclose(y, [[-4.0, -3.0, 0.0]], atol=1e-6)
    np.testing.assert_allclose(kernel, -hand.W, atol=1e-6)


def reflected(x, u, **settings):
    """x Hᵀ."""
    method = hra(rank=len(u), **settings).parts[0]
    return method.call({"default": {"u": u}}, x, Kernel(jnp.eye(x.shape[-1], dtype=x.dtype)), Ctx(), "")


def chain(x, u):
    """One reflection after the other, the last first."""
    for v in u[::-1]:
        v = v / jnp.linalg.norm(v)
        x = x - 2 * jnp.outer(x @ v, v)
    return x


def orthogonal(u):
    """Gram-Schmidt, row by row."""
    rows = []
    for v in u:
        for q in rows:
            v = v - (q @ v) * q
        rows.append(v / jnp.linalg.norm(v))
    return jnp.stack(rows)


@pytest.mark.parametrize("rank", [1, 4, 5])
@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_one_product_is_the_chain_and_its_gradient(rank, gram_schmidt):
    rng = np.random.default_rng(rank)
    x, u, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 7), (rank, 7), (3, 7)))
    step_by_step = (lambda u: chain(x, orthogonal(u))) if gram_schmidt else (lambda u: chain(x, u))
    one = lambda u: reflected(x, u, gram_schmidt=gram_schmidt)  # noqa: E731
    np.testing.assert_allclose(one(u), step_by_step(u), atol=1e-5)
    slopes = [jax.grad(lambda u, f=f: jnp.sum(w * f(u)))(u) for f in (one, step_by_step)]
    np.testing.assert_allclose(*slopes, atol=2e-5)


@pytest.mark.parametrize("rank, gram_schmidt, start", [(4, False, True), (3, False, False), (4, True, False)])
def test_the_start(rank, gram_schmidt, start):
    """Pairs of equal directions undo one another; with Gram-Schmidt they would be no directions."""
    method = hra(rank=rank, gram_schmidt=gram_schmidt, targets=["q_proj"])
    u = tree.flatten(method.init(jax.random.key(0), tiny.params(), tiny.found()).trainable)
    (u,) = u.values()
    assert bool((u[:, 0] == u[:, 1]).all()) == start
    x = jnp.eye(24)
    assert bool(jnp.abs(reflected(x, u[0], gram_schmidt=gram_schmidt) - x).max() < 1e-6) == start
    assert 0.9 < float(jnp.abs(u).max()) * np.sqrt(rank // 2 if start else rank) <= 1


def test_in_bfloat16_what_pairs_leave_is_not_lost():
    """Two directions 1% apart: what they do to x is made in float32 and rounded once."""
    rng = np.random.default_rng(0)
    v, d, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 64), (1, 64), (4, 64)))
    u, x = jnp.concatenate([v, v + 0.01 * d]), x.astype(jnp.bfloat16)
    exact = reflected(x.astype(jnp.float32), u)
    np.testing.assert_allclose(reflected(x, u).astype(jnp.float32), exact, atol=2**-8 * 4, rtol=2**-8)
    assert float(jnp.abs(exact - x.astype(jnp.float32)).max()) > 0.01


def test_more_directions_than_inputs():
    method = hra(rank=26, gram_schmidt=True, targets=["q_proj"])
    with pytest.raises(ValueError, match="rank 26 directions cannot be orthogonal among 24 inputs; at most 24"):
        method.init(jax.random.key(0), tiny.params(), tiny.found())


def test_counts():
    """28 layers, 2 sites of 3072 inputs."""
    config = {"peft_type": "HRA", "r": 32, "target_modules": ["q_proj", "v_proj"]}
    assert llama_3b.count(config)["trainable"] == 28 * 2 * 3072 * 32


def test_settings_are_checked():
    with pytest.raises(ValueError, match="hra: rank 0 must be at least 1"):
        hra(rank=0)
