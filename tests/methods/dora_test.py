import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import injection, tree
from peftax.core.method import Ctx, Kernel
from peftax.methods.dora import dora
from peftax.methods.lora import lora
from tests.methods import hand, tiny


def test_by_hand():
    """W + A B = [[3, 4, 3], [4, 3, 0]] has columns of length 5, 5, 3; m = [5, 10, 6] gives g = [1, 2, 2]."""
    leaves = {
        "a": jnp.array([[1.0, 0.0], [0.0, 1.0]]),
        "b": jnp.array([[2.0, 4.0, 2.0], [2.0, 1.0, 0.0]]),
        "m": jnp.array([5.0, 10.0, 6.0]),
    }
    y, kernel, bias = hand.outcome(dora(rank=2, alpha=2.0, targets=["layers_0"]), leaves)
    np.testing.assert_allclose(y, [[11 + 1, 20 + 1, 6 + 1]], rtol=1e-6)  # [1, 2] [[3, 8, 6], [4, 6, 0]] + b
    np.testing.assert_allclose(kernel, [[3.0, 8.0, 6.0], [4.0, 6.0, 0.0]], rtol=1e-6)
    assert bias == [1.0, 1.0, 1.0]


def test_no_gradient_through_the_norm():
    """With g held, d y / d A is LoRA's times g; through the norm it would be another."""
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 4), (3, 5)))
    theta = {"a": (5, 2), "b": (2, 4), "m": (4,)}
    theta = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in theta.items()}
    theta |= {"scale": jnp.float32(0.5), "w2": jnp.sum(w**2, 0)}
    call = _call(dora(rank=2, targets=["any"]))

    def total(a):
        return jnp.sum(call({**theta, "a": a}, x, Kernel(w), Ctx()))

    g = theta["m"] / jnp.linalg.norm(w + 0.5 * theta["a"] @ theta["b"], axis=0)
    expected = 0.5 * x.sum(0)[:, None] * (theta["b"] @ g)[None]
    np.testing.assert_allclose(jax.grad(total)(theta["a"]), expected, rtol=1e-5)


def _call(method):
    def call(theta, x, k, ctx):
        return method.parts[0].call({"default": theta}, x, k, ctx, "")

    return call


def test_a_column_of_zeros_stays_one():
    w = jnp.array([[1.0, 0.0], [2.0, 0.0]])
    theta = {"a": jnp.ones((2, 1)), "b": jnp.zeros((1, 2)), "m": jnp.array([5**0.5, 0.0])}
    theta |= {"scale": jnp.float32(2.0), "w2": jnp.sum(w**2, 0)}
    call, x = _call(dora(rank=1, targets=["any"])), jnp.array([[1.0, 1.0]])
    y, back = jax.vjp(lambda t: call({**theta, **t}, x, Kernel(w), Ctx()), {n: theta[n] for n in "abm"})
    np.testing.assert_allclose(y, [[3.0, 0.0]], rtol=1e-6)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(back(y)))


def test_a_small_change_of_length_acts_in_bf16():
    """A gain of 1.003 is 1 in bf16."""
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((5, 40), (30, 5)))
    w2 = jnp.sum(w.astype(jnp.float32) ** 2, 0)
    theta = {"a": jnp.ones((5, 1)), "b": jnp.zeros((1, 40)), "m": jnp.sqrt(w2), "w2": w2, "scale": jnp.float32(2.0)}
    call = _call(dora(rank=1, targets=["any"]))
    before, after = (call({**theta, "m": g * theta["m"]}, x, Kernel(w), Ctx()) for g in (1.0, 1.003))
    assert before.dtype == after.dtype == jnp.bfloat16
    before, after = (float(jnp.sum(jnp.abs(y.astype(jnp.float32)))) for y in (before, after))
    assert after / before == pytest.approx(1.003, abs=1e-3)


def test_norm_makes_no_dense_update():
    """Neither W + s A B nor A B is formed: every array of the kernel's size is the kernel itself."""
    call = _call(dora(rank=2, targets=["any"]))
    shapes = {"a": (50, 2), "b": (2, 40), "m": (40,), "w2": (40,), "scale": ()}
    theta = {k: jnp.zeros(s) for k, s in shapes.items()}

    def step(theta, x, w):
        return jax.grad(lambda t: jnp.sum(call(t, x, Kernel(w), Ctx()) ** 2))(theta)

    program = jax.jit(step).lower(theta, jnp.zeros((7, 50)), jnp.zeros((50, 40))).compile().as_text()
    made = [line for line in program.splitlines() if "= f32[50,40]" in line and "parameter(" not in line]
    assert not made, made


def test_needs_norms():
    assert dora().needs == "norms"
    with pytest.raises(ValueError, match="dora_only"):
        dora(bias="lora_only")
    assert tiny.found()


def test_the_backward_pass_makes_no_product_of_the_kernel_again():
    """m's slope is made of the outputs, which remat "dots" keeps."""

    def products(method):
        model = tiny.model(remat="dots")
        part = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, tiny.found()), tiny.params())
        batch = tiny.batch()

        def total(trainable, frozen):
            apply = injection.inject(model.apply, method)
            params = {"params": tree.merge(frozen, trainable)}
            return apply(params, batch["tokens"], batch["positions"], batch["segment_ids"]).sum()

        text = str(jax.make_jaxpr(jax.grad(total))(part.trainable, part.frozen))
        return len(re.findall(r"f32\[\d+,\d+,(?:20|24|40|41)\] = dot_general", text))

    assert products(dora(rank=2, targets="all-linear")) == products(lora(rank=2, targets="all-linear")) > 0
