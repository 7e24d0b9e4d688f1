"""Every method on a base in four bits: the same numbers as on the dense weights that the bits stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from peftax import methods, models, sharding
from peftax.core import injection, quantization, sites, tree
from peftax.core.method import parts
from peftax.ops.qtensor import dense
from peftax.train import loss
from peftax.train.step import State, make_step
from tests.methods import tiny

CONFIG = {**tiny.CONFIG, "hidden_size": 96, "intermediate_size": 160, "head_dim": 24}
RULES = (("_proj/kernel$", {"fmt": "nf4", "group": 32}),)
NAMES = [n for n in methods.names() if n not in ("full",)]
causal_lm = functools.partial(loss.causal_lm, chunk=8)


@functools.cache
def model(scan=True, remat="none"):
    return models.build(CONFIG, scan=scan, remat=remat)


@functools.cache
def found(scan=True):
    return sites.find(model(scan).apply, models.abstract(model(scan)), jax.ShapeDtypeStruct((1, 3), jnp.int32))


@functools.cache
def base():
    rng = np.random.default_rng(0)

    def draw(path, x):
        size = 1 / np.sqrt(x.shape[-2]) if path.endswith("kernel") else 0.3
        return jnp.asarray(rng.normal(float(path.endswith("scale")), size, x.shape), jnp.float32)

    flat = {path: draw(path, x) for path, x in tree.flatten(models.abstract(model())).items()}
    return quantization.quantize(tree.unflatten(flat), RULES, found())


def unpacked(params):
    return jax.tree.map(dense, params, is_leaf=tree.is_packed)


class Case:
    def __init__(self, name):
        self.method = tiny.method(name)
        init = jax.jit(lambda key, p: self.method.init(key, p, found()))
        part = init(jax.random.key(0), base())
        self.frozen, self.trainable = part.frozen, tiny.perturb(part.trainable)

    @functools.cache  # noqa: B019
    def program(self, packed=True, scan=True, remat="none"):
        """(trainable, frozen) -> (mean loss, gradients), compiled."""
        apply = injection.inject(model(scan, remat).apply, self.method)

        @jax.jit
        @jax.value_and_grad
        def mean(trainable, frozen):
            total, weight = causal_lm(apply, tree.merge(frozen, trainable), tiny.batch())
            return total / weight

        frozen = self.frozen if packed else unpacked(self.frozen)
        halves = (self.trainable, frozen) if scan else (unstack(self.trainable), unstack(frozen))
        return mean.lower(*halves).compile(), halves

    def loss_and_gradient(self, **how):
        program, halves = self.program(**how)
        return program(*halves)


@functools.cache
def plain():
    """The model without a method: params -> logits."""
    batch = tiny.batch()
    return jax.jit(lambda p: model().apply({"params": p}, batch["tokens"], batch["positions"], batch["segment_ids"]))


@functools.cache
def made(name):
    return Case(name)


@pytest.fixture(params=NAMES)
def case(request):
    return made(request.param)


@pytest.fixture(params=[n if n == "lora" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def few(request):
    """LoRA, and in the slow tier all."""
    return made(request.param)


def test_rules_packed_what_they_name():
    packed = {p for p, x in tree.flatten(base()).items() if tree.is_packed(x)}
    assert packed == {s.kernel for s in found().values() if s.kernel.endswith("_proj/kernel")}
    assert tree.count(base()) == tree.count(unpacked(base()))
    assert "model/layers/mlp/down_proj/kernel" in packed


def test_equals_its_dense_base(case):
    value, gradient = case.loss_and_gradient()
    dense_value, dense_gradient = case.loss_and_gradient(packed=False)
    assert abs(value - dense_value) <= 1e-5 * dense_value
    tiny.close(gradient, dense_gradient, 2e-5)
    assert tree.flatten(gradient).keys() == tree.flatten(case.trainable).keys()


@pytest.mark.parametrize("scan, remat", [(True, "full"), (True, "dots"), (False, "none")])
def test_scan_unrolled_remat(few, scan, remat):
    value, gradient = few.loss_and_gradient()
    other, other_gradient = few.loss_and_gradient(scan=scan, remat=remat)
    assert abs(value - other) <= 1e-6 * value
    tiny.close(gradient if scan else unstack(gradient), other_gradient, 2e-5)


def unstack(scanned):
    flat = {}
    for path, leaf in tree.flatten(scanned).items():
        for i in range(tiny.LAYERS) if path.startswith("model/layers/") else ():
            flat[path.replace("layers/", f"layers/{i}/", 1)] = jax.tree.map(lambda x, i=i: x[i], leaf)
        if not path.startswith("model/layers/"):
            flat[path] = leaf
    return tree.unflatten(flat)


def test_fold(case):
    """To numbers: the kernels that the method touched are dense from then on."""
    if case.method.fold is None:
        pytest.skip(f"{case.method.name} does not fold")
    apply, batch = injection.inject(model().apply, case.method), tiny.batch()
    inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
    merged = tree.merge(case.frozen, case.trainable)
    adapted = jax.jit(lambda p: apply({"params": p}, *inputs))(merged)
    folded = jax.jit(lambda p: case.method.fold(p, found()))(merged)
    seen = batch["segment_ids"] > 0
    assert tiny.distance(np.asarray(adapted)[seen], np.asarray(plain()(unpacked(folded)))[seen]) <= 2e-5


MESHES = {"2x4": {"data": 2, "fsdp": 4}, "2x4 tensor": {"fsdp": 2, "tensor": 4}}


def test_trains_on_one_device_and_on_eight(few):
    first = {}
    for name in (None, *MESHES):
        frozen, trainable, on_mesh = few.frozen, jax.tree.map(jnp.copy, few.trainable), {}
        if name:
            mesh = sharding.make_mesh(**MESHES[name])
            specs = sharding.base_specs(unpacked(base()), found(), mesh)
            lie = functools.partial(sharding.shardings, method=few.method, sites=found(), base=specs, mesh=mesh)
            frozen, trainable = (jax.device_put(x, lie(x)) for x in (frozen, trainable))
            on_mesh = {"rows": NamedSharding(mesh, sharding.BATCH), "specs": specs}
        apply = injection.inject(model().apply, few.method, **on_mesh)
        step = make_step(apply, causal_lm, optax.sgd(0.05))
        state, losses = State.create(trainable, optax.sgd(0.05)), []
        before = jax.tree.map(np.array, frozen)
        for _ in range(4):
            state, metrics = step(state, frozen, tiny.batch())
            losses.append(float(metrics["loss"]))
        jax.tree.map(np.testing.assert_array_equal, before, frozen)
        assert losses[-1] < losses[0]
        first[name] = losses
    for name in MESHES:
        np.testing.assert_allclose(first[name], first[None], rtol=2e-5)


def test_the_base_does_not_train():
    with pytest.raises(ValueError, match="full: .*kernel' is packed in few bits and cannot train"):
        methods.make("full").init(jax.random.key(0), base(), found())


def test_no_array_of_a_whole_stack_of_numbers(case):
    """In the compiled gradient no float array has the size of a stack of packed kernels."""
    if not any(m.call for m in parts(case.method)):
        pytest.skip(f"{case.method.name} adds no leaves")
    text = case.program()[0].as_text()
    for path, x in tree.flatten(case.frozen).items():
        if tree.is_packed(x):
            layers, k, n = x.shape
            for shape in ((layers, k, n), (layers, k // 2, 2, n), (layers, k // 32, 32, n)):
                assert f"f32[{','.join(map(str, shape))}]" not in text, (path, shape)


def test_a_start_that_moves_the_base_packs_it_again():
    """QPiSSA: the principal part in full, the rest in bits, nearer to W than W in bits (PiSSA, section 4)."""
    rng = np.random.default_rng(3)
    kernel = "model/layers/mlp/up_proj/kernel"
    dense_base = tree.flatten(unpacked(base()))
    spectrum = np.exp(-np.arange(96) / 8).astype(np.float32)
    u, v = (np.linalg.qr(rng.normal(size=(2, n, 96)))[0] for n in (96, 160))
    w = jnp.asarray((u * spectrum[None, None]) @ v.swapaxes(1, 2), jnp.float32)
    params = quantization.quantize(tree.unflatten({**dense_base, kernel: w}), RULES, found())
    bits = tree.flatten(params)[kernel]
    method = methods.make("lora", rank=16, alpha=16.0, init="pissa", targets=["up_proj"])
    part = jax.jit(lambda p: method.init(jax.random.key(0), p, found()))(params)
    flat = tree.flatten(tree.merge(*part))
    moved = flat[kernel]
    assert (moved.fmt, moved.shape, moved.group) == (bits.fmt, bits.shape, bits.group)
    low = flat["model/layers/mlp/up_proj/lora/default/a"] @ flat["model/layers/mlp/up_proj/lora/default/b"]
    start = dense(bits)  # what the method was given
    assert jnp.linalg.norm(dense(moved) + low - start) < 0.6 * jnp.linalg.norm(start - w)
    # what a checkpoint holds makes the same base again
    theta = {p: x for p, x in tree.flatten(part.frozen).items() if "/lora/" in p}
    again = method.move(tree.unflatten({**tree.flatten(params), **theta}), found())
    jax.tree.map(np.testing.assert_array_equal, tree.flatten(again)[kernel], moved)
