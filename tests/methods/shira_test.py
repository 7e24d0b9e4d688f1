import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import tree
from peftax.core.method import Ctx, Kernel
from peftax.methods import shira as file
from peftax.methods.shira import shira
from peftax.ops.qtensor import dense
from peftax.ops.quantize import quantize
from tests.methods import hand, llama_3b, tiny

SMALL = {"rank": 4}
TOY = {"rank": 1}


def test_by_hand():
    """D = [[1, -1, 3], [0, 0, 0.5]]; x = [1, 2] times it is [1, -1, 4], on [6, 5, 2]."""
    leaves = {
        "v": jnp.array([1.0, 0.0, -1.0, 3.0, 0.5]),
        "at": jnp.array([[0, 0], [0, 1], [1, 0], [2, 0], [2, 1]]),
    }
    y, kernel, bias = hand.outcome(shira(rank=1, targets=["layers_0"]), leaves)
    assert y == [[7.0, 4.0, 6.0]]
    assert kernel == [[2.0, -1.0, 4.0], [2.0, 2.0, 0.5]]
    assert bias == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("fmt", [None, "nf4"])
@pytest.mark.parametrize("rows", [2, 30])
def test_ways_to_multiply_are_the_folded_kernel(rows, fmt):
    """2 rows by 96 entries are gathered; 30 rows meet D itself. Slopes are those of the dense update."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(32, 64)), jnp.float32)
    k = Kernel(w if fmt is None else quantize(w, fmt, group=32), jnp.asarray(rng.normal(size=64), jnp.float32))
    x, g = (jnp.asarray(rng.normal(size=(rows, n)), jnp.float32) for n in (32, 64))
    at = jnp.asarray(file.places(0, 32, 64, 1))
    v = jnp.asarray(rng.normal(size=96), jnp.float32)
    part = shira(rank=1).parts[0]

    def call(v, x):
        return part.call({"default": {"v": v, "at": at}}, x, k, Ctx(), "")

    def plain(v, x):
        return x @ (dense(k.w) + jnp.zeros((32, 64)).at[at[:, 1], at[:, 0]].set(v)) + k.b[None]

    y, back = jax.vjp(call, v, x)
    wanted, wanted_back = jax.vjp(plain, v, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(back(g), wanted_back(g), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    program = str(jax.make_jaxpr(jax.grad(lambda v: (call(v, x) * g).sum()))(v))
    assert ("f32[32,64] = scatter-add" in program) == (rows == 30)


def test_nothing_of_the_kernels_size_is_kept():
    at, w = jnp.asarray(file.places(0, 50, 40, 1)), jnp.ones((50, 40))
    call = shira(rank=1).parts[0].call

    def of(v, x):
        return call({"default": {"v": v, "at": at}}, x, Kernel(w), Ctx(), "")

    _, back = jax.vjp(of, jnp.ones(90), jnp.ones((30, 50)))
    kept = [x for x in jax.tree.leaves(back) if x.size >= 50 * 40]
    assert all(x is w or np.array_equal(x, w) for x in kept)  # the base's own


PLACES = [[0, 1], [0, 2], [1, 1], [1, 2], [1, 6], [2, 4], [2, 5], [3, 1], [3, 2], [4, 0], [4, 1], [4, 3], [4, 5]]


def test_places_are_those_of_peft():
    """torch.randperm(40, generator=torch.Generator().manual_seed(3))[:13] as (row, column) of [5, 8], sorted."""
    assert file.places(3, 8, 5, 1).tolist() == PLACES


def test_places_lie_in_the_tree_and_follow_the_seed():
    def at(**settings):
        method = shira(rank=2, targets=["k_proj"], **settings)
        frozen, _ = method.init(jax.random.key(0), tiny.params(), tiny.found())
        return np.asarray(frozen["model"]["layers"]["self_attn"]["k_proj"]["shira"]["default"]["at"])

    first = at()
    assert first.shape == (2, 88, 2) and first.dtype == np.int32
    np.testing.assert_array_equal(first[0], first[1])
    np.testing.assert_array_equal(first, at(seed=file.UNSEEDED))
    assert not np.array_equal(first, at(seed=1))
    assert first[..., 0].max() < 20 and first[..., 1].max() < 24 and len(set(map(tuple, first[0].tolist()))) == 88


def test_trainable_leaves():
    _, trainable = shira(rank=2, targets=["k_proj"]).init(jax.random.key(0), tiny.params(), tiny.found())
    assert {p.rsplit("/", 1)[1]: x.shape for p, x in tree.flatten(trainable).items()} == {"v": (2, 88)}


def test_counts_are_those_of_pefts_run():
    config = {"peft_type": "SHIRA", "r": 32, "random_seed": 42, "target_modules": ["q_proj", "v_proj"]}
    assert llama_3b.count(config) == {"trainable": 9_175_040, "total": 3_221_924_864}


def test_settings_are_checked():
    with pytest.raises(ValueError, match="shira: rank 0 must be at least 1"):
        shira(rank=0)
    with pytest.raises(ValueError, match=r"rank 32 would train 1408 entries of a kernel \[24, 20\].*at most rank 10"):
        shira(targets=["k_proj"]).init(jax.random.key(0), tiny.params(), tiny.found())
