"""The contract tests run the plain variant; what they ask of a method is asked here of all three."""

import jax
import jax.numpy as jnp
import pytest

from peftax.core import injection, tree
from peftax.core.method import Ctx, Kernel
from peftax.methods import miss as file
from peftax.methods.miss import miss
from tests.methods import hand, llama_3b, tiny

SMALL = {"rank": 7}  # divides nothing
TOY = {"rank": 2}
HEADS = {"targets": ["q_proj", "o_proj"], "rank": 4}
VARIANTS = {"mini": {**HEADS, "rank": 7, "mini_rank": 2}, "bat": HEADS}


@pytest.mark.parametrize(
    "settings, leaves, y, kernel",
    [
        # both inputs are one block: s(x) = 1 + 2, times [1, 0, 2], on [6, 5, 2]
        (
            {"rank": 1},
            {"d": [[1.0, 0.0, 2.0]]},
            [9.0, 5.0, 8.0],
            [[2.0, 0.0, 3.0], [3.0, 2.0, 2.0]],
        ),
        # two blocks of one input: D is added to W as it is, and [1, 2] D = [1, 4, 2]
        (
            {"rank": 2},
            {"d": [[1.0, 0.0, 2.0], [0.0, 2.0, 0.0]]},
            [7.0, 9.0, 4.0],
            [[2.0, 0.0, 3.0], [2.0, 4.0, 0.0]],
        ),
        # one number for each output too: 3 times 2
        ({"variant": "mini", "rank": 1}, {"d_mini": [[2.0]]}, [12.0, 11.0, 8.0], [[3.0, 2.0, 3.0], [4.0, 4.0, 2.0]]),
        # blocks of one number: w + m (w + 1), by columns m = 1, 0, 2
        (
            {"variant": "bat", "rank": 1},
            {"m": [[[1.0]], [[0.0]], [[2.0]]]},
            [1 * 3 + 2 * 5 + 1.0, 5.0, 1 * 5 + 2 * 2 + 1.0],
            [[3.0, 0.0, 5.0], [5.0, 2.0, 2.0]],
        ),
    ],
)
def test_by_hand(settings, leaves, y, kernel):
    got = hand.outcome(miss(targets=["layers_0"], **settings), {k: jnp.array(v) for k, v in leaves.items()})
    assert got == ([y], kernel, [1.0, 1.0, 1.0])


def test_bat_by_hand():
    """W_b = [[1, 2], [3, 4]], M = [[0, 1], [2, 0]]: Mᵀ (W_b + I) = [[0, 2], [1, 0]] [[2, 2], [3, 5]]."""
    k, theta = Kernel(jnp.array([[1.0, 2.0], [3.0, 4.0]])), {"m": jnp.array([[[0.0, 1.0], [2.0, 0.0]]])}
    method = miss(variant="bat", rank=2, targets=["x"]).parts[0]
    eye = method.call({"default": theta}, jnp.eye(2), k, Ctx(), "")
    assert eye.tolist() == [[1.0 + 6.0, 2.0 + 10.0], [3.0 + 2.0, 4.0 + 2.0]]


@pytest.mark.parametrize("variant", ["mini", "bat"])
def test_call_is_the_folded_kernel(variant):
    """On all layers of the tiny Llama, scanned."""
    method = tiny.method("miss", variant=variant, **VARIANTS[variant])
    assert method.needs == ("dense" if variant == "bat" else "product")
    part = method.init(jax.random.key(0), tiny.params(), tiny.found())
    merged, batch = tree.merge(part.frozen, tiny.perturb(part.trainable)), tiny.batch()
    inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
    adapted = jax.jit(injection.inject(tiny.model().apply, method))({"params": merged}, *inputs)
    folded = jax.jit(tiny.model().apply)({"params": method.fold(merged, tiny.found())}, *inputs)
    plain = jax.jit(tiny.model().apply)({"params": tiny.params()}, *inputs)
    seen = batch["segment_ids"] > 0
    assert tiny.distance(adapted[seen], folded[seen]) <= 1e-5
    assert tiny.distance(adapted[seen], plain[seen]) >= 0.05


def test_plain_and_mini_act_on_x():
    """No array of the kernel's size is made, forward or backward; bat makes one, and keeps none."""
    k, x = Kernel(jnp.ones((50, 40))), jnp.ones((7, 50))
    for variant, leaf in (("plain", (10, 40)), ("mini", (10, 4)), ("bat", (4, 10, 10))):
        part = miss(variant=variant, rank=10, mini_rank=4, targets=["x"]).parts[0]
        name = {"plain": "d", "mini": "d_mini", "bat": "m"}[variant]

        def call(d, x, part=part, name=name):
            return part.call({"default": {name: d}}, x, k, Ctx(), "")

        d = jnp.ones(leaf)
        program = str(jax.make_jaxpr(jax.grad(lambda d, call=call: call(d, x).sum()))(d))
        assert (":f32[50,40] = " in program.replace("broadcast_in_dim", "")) == (variant == "bat")
        _, back = jax.vjp(call, d, x)
        kept = [leaf for leaf in jax.tree.leaves(back) if leaf.shape == (50, 40)]
        assert all(bool((leaf == k.w).all()) for leaf in kept)


@pytest.mark.parametrize("variant", [True, "bat"])
def test_counts_are_those_of_pefts_runs(variant):
    config = {"peft_type": "MISS", "r": 64, "target_modules": ["q_proj", "v_proj"], "init_weights": variant}
    assert llama_3b.count(config) == {"trainable": 7_340_032, "total": 3_220_089_856}


@pytest.mark.parametrize("variant, bias", [("plain", "miss_only"), ("mini", "all"), ("bat", "none")])
def test_config_there_and_back(variant, bias):
    mine = miss(variant=variant, rank=4, mini_rank=2, targets=["q_proj"], layers=[1], bias=bias).config
    again = miss(**file.HF.read({"peft_type": "MISS", **file.HF.write(mine)})).config
    assert [k for k in mine if mine[k] != again[k] and (mine[k] or again[k])] == []
    assert file.HF.read({"target_modules": ["q"], "init_weights": False})["variant"] == "plain"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"variant": "bone"}, "variant 'bone' is none of 'plain', 'mini', 'bat'"),
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"dropout": 0.1, "variant": "bat"}, "'bat' is a change of the kernel"),
        ({"rank": 25}, "rank 25 is more than the 24 inputs"),
        ({"rank": 4, "variant": "mini", "mini_rank": 3}, "mini_rank 3 does not divide the 40 outputs"),
        ({"rank": 7, "variant": "bat"}, r"rank 7 must divide both sides of a kernel for 'bat'; one is \[24, 40\]"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=f"miss: .*{message}"):
        miss(targets=["q_proj"], **settings).init(jax.random.key(0), tiny.params(), tiny.found())
