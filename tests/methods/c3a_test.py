import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import tree
from peftax.core.method import Ctx, Kernel
from peftax.methods.c3a import HF, c3a
from tests.methods import hand, llama_3b, tiny

# w starts so small by default that a perturbation of its own size would not show
LINEAR = [*(f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")), "lm_head"]
SMALL = {"block": 1, "block_pattern": {"[qo]_proj": 8, "[kv]_proj": 4}, "init": "gaussian", "targets": LINEAR}
TOY = {"block": 1, "block_pattern": {"query|key|value|out": 3}, "init": "gaussian"}


def test_by_hand():
    """x = [e0, e1] through blocks of 3: y_i = w0[(0 - i) mod 3] + w1[(1 - i) mod 3], divided by 6 inputs."""
    theta = {"w": jnp.array([[[6.0, 12.0, 18.0], [0.0, 0.0, 36.0]]])}
    x, k = jnp.array([[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]]), Kernel(jnp.zeros((6, 3)))
    part = c3a(block=3).parts[0]
    np.testing.assert_allclose(part.call({"default": theta}, x, k, Ctx(), ""), [[1.0, 3.0, 8.0]], atol=1e-6)


def test_blocks_of_one_by_hand():
    """Every number its own: [[2, 4, 6], [8, 2, 0]] / 2 on W; x = [1, 2] times it is [9, 4, 3], on [6, 5, 2]."""
    leaves = {"w": jnp.array([[2.0, 8.0], [4.0, 2.0], [6.0, 0.0]])[..., None]}
    y, kernel, bias = hand.outcome(c3a(block=1, targets=["layers_0"]), leaves)
    assert y == [[15.0, 9.0, 5.0]]
    assert kernel == [[2.0, 2.0, 4.0], [6.0, 3.0, 0.0]]
    assert bias == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("block", [2, 3, 6])
def test_is_the_folded_kernel(block):
    """Even and odd lengths, more outputs than inputs; no array of the kernel's size on the way."""
    rng = np.random.default_rng(0)
    part = c3a(block=block).parts[0]
    w = jnp.asarray(rng.normal(size=(30 // block, 12 // block, block)), jnp.float32)
    x, k = jnp.asarray(rng.normal(size=(4, 12)), jnp.float32), Kernel(jnp.zeros((12, 30)))
    update = np.zeros((12, 30))
    for j in range(12):
        for i in range(30):
            update[j, i] = w[i // block, j // block, (j - i) % block] / 12

    def call(w, x):
        return part.call({"default": {"w": w}}, x, k, Ctx(), "")

    y, back = jax.vjp(call, w, x)
    np.testing.assert_allclose(y, x @ update, atol=1e-5)
    dw, dx = back(jnp.ones_like(y))
    np.testing.assert_allclose(dx, np.ones((4, 30)) @ update.T, atol=1e-5)
    np.testing.assert_allclose(jnp.vdot(dw, w), y.sum(), rtol=1e-4)  # y is linear in w
    program = str(jax.make_jaxpr(jax.grad(lambda w: call(w, x).sum()))(w))
    assert "fft" in program and "f32[12,30] = " not in program and "f32[30,12] = " not in program


@pytest.mark.parametrize(
    "init, deviation", [("xavier_uniform", (2 / 64) ** 0.5), ("kaiming_uniform", (1 / 72) ** 0.5), ("gaussian", 1.0)]
)
def test_starts(init, deviation):
    method = c3a(block=4, init=init, targets=["q_proj"])
    _, trainable = method.init(jax.random.key(0), tiny.params(), tiny.found())
    ((_, w),) = tree.flatten(trainable).items()
    assert w.shape == (2, 10, 6, 4) and float(jnp.std(w)) == pytest.approx(deviation, rel=0.1)
    assert not np.array_equal(w[0], w[1])


def test_pefts_words_for_the_start():
    for theirs, ours in ((True, "zeros"), (False, "xavier_uniform"), ("gaussian", "gaussian")):
        config = {"peft_type": "C3A", "target_modules": ["q_proj"], "init_weights": theirs}
        assert HF.read(config)["init"] == ours
    assert HF.write(c3a(init="zeros").config)["init_weights"] is True
    assert HF.write(c3a(init="gaussian").config)["init_weights"] == "gaussian"


def test_layers_of_unlike_blocks_are_refused_in_one_stack():
    method = c3a(block=4, targets=["q_proj"], block_pattern={r"layers\.1\..*": 2})
    with pytest.raises(ValueError, match=r"c3a: .*layers\.0.*'block': 4.* and .*layers\.1.*'block': 2.*scan=False"):
        method.init(jax.random.key(0), tiny.params(), tiny.found())
    _, trainable = method.init(jax.random.key(0), tiny.params(scan=False), tiny.found(scan=False))
    assert [x.shape for x in jax.tree.leaves(trainable)] == [(10, 6, 4), (20, 12, 2)]


def test_a_block_that_does_not_divide():
    with pytest.raises(ValueError, match="c3a: block 256 must divide.*that divides 24, 40 is 8"):
        c3a(targets=["q_proj"]).init(jax.random.key(0), tiny.params(), tiny.found())


def test_counts_are_those_of_pefts_run():
    """Its MetaMathQA run, of blocks of 64."""
    config = {"peft_type": "C3A", "block_size": 64, "target_modules": ["q_proj", "v_proj"]}
    assert llama_3b.count(config)["trainable"] == 5_505_024


def test_settings_are_checked():
    with pytest.raises(ValueError, match="c3a: block 0 must be at least 1"):
        c3a(block=0)
    with pytest.raises(ValueError, match="c3a: init 'ones' is none of 'xavier_uniform'"):
        c3a(init="ones")
