import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import tree
from peftax.methods import randlora as file
from peftax.methods.randlora import randlora
from tests.methods import hand, llama_3b, tiny

SMALL = {"rank": 7, "alpha": 7.0}  # the default scale of 20 is for many small numbers
TOY = {"rank": 2, "alpha": 2.0}


def test_by_hand():
    """in 2, out 3, rank 1: two bases; scaled a [[2 * 1 * 1, 2 * 3 * 2], [1 * 1 * 3, 1 * 3 * 4]] = [[2, 12], [3, 12]].

    x = [1, 2] gives [26, 27]; b's columns [1, 0, 1] and [0, 1, 1]: [26, 27, 53], s = 2, on [6, 5, 2].
    """
    leaves = {"lam": jnp.array([[2.0], [1.0]]), "gamma": jnp.array([[1.0, 3.0], [2.0, 4.0]])}
    shared = {"a": jnp.array([[[1.0, 3.0]]]), "b": jnp.array([[[1.0], [0.0]], [[0.0], [1.0]], [[1.0], [1.0]]])}
    y, kernel, bias = hand.outcome(randlora(rank=1, alpha=2.0, targets=["layers_0"]), leaves, shared)
    assert y == [[58.0, 59.0, 108.0]]
    assert kernel == [[5.0, 6.0, 11.0], [26.0, 26.0, 48.0]]
    assert bias == [1.0, 1.0, 1.0]


def test_pairs_of_rank_and_base_are_counted_as_peft_does():
    """The scaled side counts bases first and the fixed side ranks first: with 2 of each, pairs 1 and 2 are crossed."""
    lam = jnp.array([[1.0, 10.0], [100.0, 1000.0]])  # [base, rank]
    a = jnp.array([1.0, 2.0])[:, None, None] * jnp.ones((2, 1, 4))
    b = jnp.eye(4).reshape(4, 2, 2)  # row p is pair p = 2 base + rank
    theta = {"lam": lam, "gamma": jnp.ones((4, 2)), "a": a, "b": b, "scale": jnp.float32(1.0)}
    k = file.Kernel(jnp.zeros((4, 4)))
    y = randlora(rank=2).parts[0].call({"default": theta}, jnp.array([[1.0, 0.0, 0.0, 0.0]]), k, file.Ctx(), "")
    assert y.tolist() == [[1.0, 100.0, 20.0, 2000.0]]  # (rank 0, base 0), (0, 1), (1, 0), (1, 1)


def bases(**settings):
    method = randlora(**{"rank": 5, "targets": ["q_proj", "down_proj"], **settings})
    return method.init(jax.random.key(0), tiny.params(), tiny.found())[0]["randlora"]["default"]


def test_bases_are_as_wide_as_the_widest_site_and_stand_once():
    found = bases()
    assert {k: v.shape for k, v in found.items()} == {"a": (5, 1, 40), "b": (41, 8, 5)}
    for x in found.values():
        assert float(jnp.std(x)) == pytest.approx(1.0, rel=0.02)
        np.testing.assert_array_equal(x, x.astype(jnp.bfloat16).astype(jnp.float32))


def test_bases_follow_the_seed_not_the_key():
    assert not np.array_equal(bases(seed=1)["a"], bases(seed=2)["a"])
    np.testing.assert_array_equal(bases(seed=1)["b"], bases(seed=1)["b"])


@pytest.mark.parametrize("settings, share", [({"sparse": True}, 1 / 3), ({"very_sparse": True}, 1 / np.sqrt(40))])
def test_sparse(settings, share):
    b = np.asarray(bases(**settings)["b"])
    values = np.unique(b)
    assert len(values) == 3 and values[1] == 0 and values[0] == -values[2]
    assert (b != 0).mean() == pytest.approx(share, abs=0.04)
    assert b.std(ddof=1) == pytest.approx(1.0, rel=1e-4)


def test_nothing_of_the_kernels_size_is_kept():
    theta = {"lam": (4, 10), "gamma": (40, 4), "a": (10, 1, 40), "b": (50, 4, 10), "scale": ()}
    theta = {k: jnp.ones(s) for k, s in theta.items()}
    call, w = randlora(rank=10).parts[0].call, jnp.ones((50, 40))
    trained = {k: theta[k] for k in ("lam", "gamma")}
    _, back = jax.vjp(
        lambda t, x: call({"default": {**theta, **t}}, x, file.Kernel(w), file.Ctx(), ""), trained, jnp.ones((7, 50))
    )
    kept = sorted(x.shape for x in jax.tree.leaves(back) if x.size >= 40 * 40)
    assert kept in ([(50, 4, 10)], [(50, 4, 10), (50, 40)])  # the base's own and the shared one


def test_trainable_leaves():
    _, trainable = randlora(rank=7, targets=["k_proj"]).init(jax.random.key(0), tiny.params(), tiny.found())
    flat = {p.rsplit("/", 1)[1]: x for p, x in tree.flatten(trainable).items()}
    assert {k: v.shape for k, v in flat.items()} == {"lam": (2, 3, 7), "gamma": (2, 20, 3)}
    np.testing.assert_allclose(flat["gamma"], 1 / 20)


def test_counts_are_those_of_pefts_run():
    config = {"peft_type": "RANDLORA", "r": 32, "target_modules": ["q_proj", "v_proj"]}
    assert llama_3b.count(config) == {"trainable": 9_289_728, "total": 3_222_039_552}


def test_settings_are_checked():
    with pytest.raises(ValueError, match="randlora: rank 0 must be at least 1"):
        randlora(rank=0)
    with pytest.raises(ValueError, match="randlora: dropout"):
        randlora(dropout=-0.1)
    with pytest.raises(ValueError, match="randlora_only"):
        randlora(bias="lora_only")
