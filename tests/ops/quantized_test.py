"""The product of a packed weight: numbers, gradient, batching, mesh; the weight is read once."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from peftax import sharding
from peftax.ops import quantized
from peftax.ops.product import matmul
from peftax.ops.qtensor import LEVELS, dense
from tests.ops import packed


def close(a, b, tolerance=5e-6):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("fmt", LEVELS)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3)])
def test_equals_the_dense_product(fmt, lead):
    w = packed.weight(fmt, 64, 24)
    x = jax.random.normal(jax.random.key(0), (*lead, 64))

    def through(product):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(product(x))))(x)

    ours, plain = jax.jit(lambda: through(lambda x: matmul(x, w)))(), through(lambda x: x @ dense(w))
    jax.tree.map(lambda a, b: close(a, b, 3e-5), ours, plain)


def test_bfloat16_rounds_the_weight_once():
    w = packed.weight("nf4", 64, 24)
    x = jax.random.normal(jax.random.key(0), (4, 64), jnp.bfloat16)
    y = matmul(x, w.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, x @ dense(w).astype(jnp.bfloat16))


def test_a_wrong_contraction_is_named():
    with pytest.raises(ValueError, match=r"x \(3, 32\) does not contract with w \(64, 24\)"):
        matmul(jnp.ones((3, 32)), packed.weight("nf4", 64, 24))


def test_no_rows_are_no_rows():
    w = packed.weight("nf4", 64, 24)
    assert matmul(jnp.ones((0, 64)), w).shape == (0, 24)
    assert jax.grad(lambda x: matmul(x, w).sum())(jnp.ones((2, 0, 64))).shape == (2, 0, 64)


def products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from products(inner)


def test_members_share_one_reading():
    """vmap over x, forward and backward: products of [members x rows], no batched weight."""
    w = packed.weight("nf4", 64, 24)
    x = jax.random.normal(jax.random.key(0), (3, 5, 64))

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(matmul(x, w))))(x)

    close(jax.vmap(gradient)(x), jnp.stack([gradient(row) for row in x]))
    dots = list(products(jax.make_jaxpr(jax.vmap(gradient))(x).jaxpr))
    assert len(dots) == 2
    for dot in dots:
        assert dot.params["dimension_numbers"][1] == ((), ())  # no batch axes
        assert dot.invars[0].aval.shape[0] == 15
    program = jax.jit(jax.vmap(gradient)).lower(x).compile().as_text()
    assert "[64,24]" in program and "[3,64,24]" not in program and "[3,32,24]" not in program


def test_no_gradient_of_the_weight():
    """The compiled gradient makes two products, both of rows: nothing of the weight's size but the weight."""
    w, x = packed.weight("nf4", 64, 24), jnp.ones((5, 64))

    def gradients(x, w):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(matmul(x, w))), (0, 1), allow_int=True)(x, w)

    dots = list(products(jax.make_jaxpr(gradients)(x, w).jaxpr))
    assert [dot.outvars[0].aval.shape for dot in dots] == [(5, 24), (5, 64)]
    _, of_w = gradients(x, w)
    assert of_w.packed.dtype == jax.dtypes.float0 and not np.asarray(of_w.scale).any()


def test_weights_mapped_too():
    w = packed.weight("int4", 64, 24, lead=(3,))
    x = jax.random.normal(jax.random.key(0), (3, 5, 64))
    close(jax.vmap(matmul)(x, w), jnp.einsum("ebk,ekn->ebn", x, dense(w)))
    close(jax.vmap(matmul, (None, 0))(x[0], w), jnp.einsum("bk,ekn->ebn", x[0], dense(w)))
    dx = jax.vmap(jax.grad(lambda x, w: jnp.sum(matmul(x, w) ** 2)))(x, w)
    close(dx, jax.vmap(jax.grad(lambda x, w: jnp.sum((x @ dense(w)) ** 2)))(x, w), 1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_slices_it(remat):
    w = packed.weight("nf4", 32, 32, lead=(4,))
    x = jax.random.normal(jax.random.key(0), (5, 32))

    def loss(x, layers):
        step = lambda x, w: (jnp.tanh(matmul(x, w)), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(jax.checkpoint(step) if remat else step, x, layers)[0])

    def plain(x):
        for layer in dense(w):
            x = jnp.tanh(x @ layer)
        return jnp.sum(x)

    jax.tree.map(close, jax.jit(jax.value_and_grad(loss))(x, w), jax.value_and_grad(plain)(x))


def test_on_a_mesh_packed_bytes_move():
    """Rows over eight devices, the weight split over them: what is gathered is uint8."""
    mesh = sharding.make_mesh(data=2, fsdp=4)
    w = packed.weight("nf4", 64, 32)
    x = jax.random.normal(jax.random.key(0), (16, 6, 64))
    rows = NamedSharding(mesh, sharding.BATCH)

    def loss(x, w):
        return jnp.sum(jnp.sin(quantized.product(x, dataclasses.replace(w, rows=rows))))

    lies = sharding.of_leaf(w, PartitionSpec("fsdp", None), mesh)
    placed = jax.tree.map(jax.device_put, w, lies)
    step = jax.jit(jax.value_and_grad(loss)).lower(jax.device_put(x, rows), placed).compile()
    value, dx = step(jax.device_put(x, rows), placed)
    plain, dx_plain = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(x @ dense(w))))(x)
    close(value, plain, 1e-5)
    close(dx, dx_plain)
    gathers = [line for line in step.as_text().splitlines() if " all-gather(" in line or "all-gather-start(" in line]
    assert gathers and not [line for line in gathers if "[64,32]" in line and "u8" not in line], gathers


def doubled(w, seed=0):
    """The same codes with scales in eight bits, more than 256 of them: a part's numbers begin inside a run of 256."""
    rng = np.random.default_rng(seed)
    return dataclasses.replace(
        w,
        scale=jnp.asarray(rng.integers(0, 256, w.scale.shape), jnp.uint8),
        nested=jnp.asarray(rng.uniform(0.01, 0.02, -(-w.scale.size // 256)), jnp.float32),
        offset=jnp.float32(0.05),
    )


WEIGHTS = {  # [K, N] = [256, 96], of which a mesh axis of 4 cuts K into parts of 64
    "nf4": lambda: packed.weight("nf4", 256, 96),
    "doubled": lambda: doubled(packed.weight("nf4", 256, 96)),
    "q4_1": lambda: packed.weight("q4_1", 256, 96, group=64),
    "int8, one group": lambda: packed.weight("int8", 256, 96, group=256),
}
SPLITS = {"columns": ("fsdp", "tensor"), "rows": ("tensor", "fsdp"), "both": (("fsdp", "tensor"), None)}


def on_mesh(w, mesh, split):
    """(the weight on its shards, as a product sees it)"""
    lies = sharding.of_leaf(w, PartitionSpec(*split), mesh)
    rows = NamedSharding(mesh, sharding.BATCH)
    return jax.tree.map(jax.device_put, w, lies), lambda w: dataclasses.replace(w, rows=rows, split=split)


def moved(text):
    """{operation: the shapes that collectives of a compiled program give, such as "u8[128,24]"}."""
    found = {}
    for line in text.splitlines():
        for kind in ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute"):
            if re.search(rf" {kind}(-start)?\(", line):
                found.setdefault(kind, []).extend(re.findall(r"\w+\[[\d,]*\]", line.split(f" {kind}")[0]))
    return found


def sized(shape):
    """ "u8[128,24]" -> ("u8", 3072)"""
    dtype, sizes = shape.rstrip("]").split("[")
    return dtype, math.prod(int(n) for n in sizes.split(",") if n)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_columns_and_rows_over_a_tensor_axis(kind, split):
    """Forward and dx as unsharded; parts over `tensor` stay where they lie, parts over `fsdp` are gathered packed."""
    w, mesh = WEIGHTS[kind](), sharding.make_mesh(data=1, fsdp=2, tensor=4)
    placed, seen = on_mesh(w, mesh, SPLITS[split])
    x = jax.random.normal(jax.random.key(0), (2, 3, 256))

    def loss(x, w):
        return jnp.sum(jnp.sin(matmul(x, seen(w))))

    step = jax.jit(jax.value_and_grad(loss)).lower(x, placed).compile()
    value, dx = step(x, placed)
    plain, dx_plain = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(x @ dense(w))))(x)
    close(value, plain, 2e-5)
    close(dx, dx_plain, 2e-5)
    moving = moved(step.as_text())
    floats = [size for kind in moving for dtype, size in map(sized, moving[kind]) if dtype == "f32"]
    assert (
        max(floats) <= 3 * 256
    )  # rows of x and y, and scales; of the weight's numbers a device's share is 4 times that
    assert any(dtype in ("u8", "s8") for dtype, _ in map(sized, moving["all-gather"]))
    shapes = re.findall(r"f32\[[\d,]+\]", step.as_text())
    assert max(size for _, size in map(sized, shapes)) <= 256 * 96 // 4  # no device makes more than its own part


def test_one_sum_each_way():
    """Split rows add y up and nothing in dx, split columns the other way round; no other number of x's size moves."""
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=8)
    x = jax.random.normal(jax.random.key(0), (2, 3, 256))
    for split, forward, backward in ((("tensor", None), 1, 0), ((None, "tensor"), 0, 1)):
        placed, seen = on_mesh(WEIGHTS["doubled"](), mesh, split)
        lies = NamedSharding(mesh, PartitionSpec(None, None, split[0]))
        product = lambda x, w, seen=seen: matmul(x, seen(w))  # noqa: E731
        one = jax.jit(product, in_shardings=(lies, None)).lower(jax.device_put(x, lies), placed).compile().as_text()
        dy_lies = NamedSharding(mesh, PartitionSpec(None, None, split[1]))
        dy = jax.device_put(jnp.ones((2, 3, 96)), dy_lies)
        back = jax.jit(lambda x, w, dy, p=product: jax.vjp(lambda x: p(x, w), x)[1](dy))
        two = back.lower(jax.device_put(x, lies), placed, dy).compile().as_text()
        for text, sums in ((one, forward), (two, backward)):
            assert {kind: len(shapes) for kind, shapes in moved(text).items()} == ({"all-reduce": 1} if sums else {})


@pytest.mark.parametrize("lead", [(3, 5), (7,), ()], ids=str)
def test_rows_that_the_mesh_does_not_divide(lead):
    """Every device then has them all; the weight's parts stay."""
    w, mesh = WEIGHTS["doubled"](), sharding.make_mesh(data=2, fsdp=2, tensor=2)
    placed, seen = on_mesh(w, mesh, ("tensor", "fsdp"))
    x = jax.random.normal(jax.random.key(0), (*lead, 256))
    close(jax.jit(lambda x, w: matmul(x, seen(w)))(x, placed), x @ dense(w), 2e-5)


def test_a_part_that_would_cut_a_group_is_gathered():
    w, mesh = packed.weight("nf4", 192, 32, group=64), sharding.make_mesh(data=1, fsdp=2, tensor=4)  # 3 groups
    placed, seen = on_mesh(w, mesh, ("tensor", None))
    x = jax.random.normal(jax.random.key(0), (4, 192))
    step = jax.jit(lambda x, w: matmul(x, seen(w))).lower(x, placed).compile()
    close(step(x, placed), x @ dense(w), 2e-5)
    assert [s for s in moved(step.as_text())["all-gather"] if s.startswith("u8[96,32]")]


def test_members_on_a_mesh():
    """vmap puts members behind the batch's rows: forward and dx as unsharded, and the weight is gathered once each."""
    w, mesh = WEIGHTS["doubled"](), sharding.make_mesh(data=2, fsdp=2, tensor=2)
    placed, seen = on_mesh(w, mesh, ("fsdp", "tensor"))
    x = jax.random.normal(jax.random.key(0), (3, 4, 6, 256))

    def gradient(x, w):
        return jax.grad(lambda x: jnp.sum(jnp.sin(matmul(x, w))))(x)

    step = jax.jit(lambda x, w: jax.vmap(gradient, (0, None))(x, seen(w))).lower(x, placed).compile()
    close(step(x, placed), jax.vmap(lambda x: jax.grad(lambda x: jnp.sum(jnp.sin(x @ dense(w))))(x))(x), 2e-5)
    gathered = [s for s in moved(step.as_text())["all-gather"] if s.startswith("u8[128,48]")]
    assert 1 <= len(gathered) <= 2


def test_bfloat16_and_remat_over_a_tensor_axis():
    w, mesh = packed.weight("int4", 256, 96), sharding.make_mesh(data=1, fsdp=2, tensor=4)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), packed.weight("int4", 256, 256))
    lies = sharding.of_leaf(stack, PartitionSpec(None, "tensor", "fsdp"), mesh)
    placed, (last, seen) = jax.tree.map(jax.device_put, stack, lies), on_mesh(w, mesh, ("fsdp", "tensor"))
    x = jax.random.normal(jax.random.key(0), (4, 256), jnp.bfloat16)
    over = lambda w, split: dataclasses.replace(seen(w.astype(jnp.bfloat16)), split=split)  # noqa: E731

    @jax.jit
    @jax.value_and_grad
    def sharded(x, layers, w):
        step = jax.checkpoint(lambda x, w: (jnp.tanh(matmul(x, over(w, ("tensor", "fsdp")))), None))
        y = matmul(jax.lax.scan(step, x, layers)[0], over(w, ("fsdp", "tensor")))
        return jnp.sum(y.astype(jnp.float32) ** 2)

    @jax.value_and_grad
    def plain(x):
        for _ in range(2):
            x = jnp.tanh(x @ dense(jax.tree.map(lambda a: a[0], stack)).astype(jnp.bfloat16))
        return jnp.sum((x @ dense(w).astype(jnp.bfloat16)).astype(jnp.float32) ** 2)

    (value, dx), (plain_value, plain_dx) = sharded(x, placed, last), plain(x)
    close(value, plain_value, 2e-2)
    close(dx.astype(jnp.float32), plain_dx.astype(jnp.float32), 5e-2)
