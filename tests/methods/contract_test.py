"""The laws of docs/design.md, for every method that peftax/methods holds. Nothing here names one.

A new file is tested by being there. What a method's record says decides what is asked of it: one without
`call` adds no leaves,
one whose text promises "Identity at init" has to be it. All but that law run at a perturbed theta.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from peftax import methods, models, sharding
from peftax.core import injection, sites, tree
from peftax.core.method import Ctx, parts
from peftax.train import loss
from peftax.train.step import State, make_step, state_shardings
from tests.methods import tiny

REORDERED = {"full": 2e-5}  # its biases' slopes cancel: sums in another order are 1.3e-5 apart on some CPUs; else 1e-5
STEPS = 20
causal_lm = functools.partial(loss.causal_lm, chunk=8)  # 22 positions: two chunks and a padded third


class Case:
    """A method on the tiny Llama; what is compiled is kept."""

    def __init__(self, name: str):
        known = methods.defaults(name)
        self.name, self.drops = name, "dropout" in known
        self.method = tiny.method(name, **({"dropout": 0.3} if self.drops else {}))
        self.acting = [m for m in parts(self.method) if m.call is not None]
        self.sites, self.optimizer = tiny.found(), tiny.either()

    @functools.cached_property
    def start(self):
        return self.init(scan=True)

    @functools.cache  # noqa: B019
    def init(self, scan):
        init = jax.jit(lambda key, p: self.method.init(key, p, tiny.found(scan)))
        return init(jax.random.key(0), tiny.params(scan))

    @functools.cached_property
    def frozen(self):
        return self.start.frozen

    @functools.cached_property
    def trainable(self):
        return tiny.perturb(self.start.trainable)

    def halves(self, scan):
        return (self.frozen, self.trainable) if scan else (tiny.unstack(self.frozen), tiny.unstack(self.trainable))

    @functools.cached_property
    def logits(self):
        apply = injection.inject(tiny.model().apply, self.method)
        batch = tiny.batch()
        return jax.jit(lambda p: apply({"params": p}, batch["tokens"], batch["positions"], batch["segment_ids"]))

    def gradient(self, scan=True, remat="none", dropout=True):
        """(seed, batch) -> (mean loss, gradients) of the perturbed theta."""
        return self._gradient(scan, remat, dropout and self.drops)

    @functools.cache  # noqa: B019
    def _gradient(self, scan, remat, dropout):
        apply = injection.inject(tiny.model(scan, remat).apply, self.method)

        @jax.jit
        @jax.value_and_grad
        def mean(trainable, frozen, batch, key):
            ctx = Ctx(key=key if dropout else None)
            total, weight = causal_lm(apply, tree.merge(frozen, trainable), batch, ctx)
            return total / weight

        def run(seed=0, batch=None):
            frozen, trainable = self.halves(scan)
            return mean(trainable, frozen, tiny.batch() if batch is None else batch, jax.random.key(seed))

        return run

    @functools.cache  # noqa: B019
    def stepper(self, devices, dropout, accumulate):
        """(step with either optimizer, what lays a state, the frozen half and a batch where it wants them)."""
        optimizer, mesh = self.optimizer, MESHES[devices]()
        options = {"dropout_seed": 5 if dropout else None, "accumulate": accumulate}
        rows, lay = None, lambda *args: args
        if mesh is not None:
            base = sharding.base_specs(tiny.params(), self.sites, mesh)
            lie = functools.partial(sharding.shardings, method=self.method, sites=self.sites, base=base, mesh=mesh)
            rows, whole = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, PartitionSpec())
            shapes = State.create(self.trainable, optimizer)
            options["shardings"] = state_shardings(shapes, lie(self.trainable), optimizer, whole)

            def lay(state, frozen, batch):
                return jax.device_put((state, frozen, batch), (options["shardings"], lie(frozen), rows))

        apply = injection.inject(tiny.model().apply, self.method, rows=rows)
        return make_step(apply, causal_lm, optimizer, **options), lay, options.get("shardings")

    def train(
        self, devices="1", *, adam, rate, steps=STEPS, goal=0.0, start=None, batch=None, dropout=True, accumulate=1
    ):
        """Steps from the perturbed theta, until the loss is `goal` of the first: losses, first gradients, the last
        state; laws 4 and 7 on the way.
        """
        step, lay, places = self.stepper(devices, dropout and self.drops, accumulate)
        state = tiny.begin(self.trainable if start is None else start, self.optimizer, adam=adam, rate=rate)
        state, frozen, batch = lay(state, self.frozen, tiny.batch() if batch is None else batch)
        before, losses, first = jax.tree.map(np.array, frozen), [], None
        for _ in range(steps):
            old = state
            state, metrics = step(state, frozen, batch)
            assert all(x.is_deleted() for x in jax.tree.leaves(old.trainable))  # the state is donated,
            losses.append(float(metrics["loss"]))
            assert bool(metrics["finite"])
            first = jax.tree.map(np.array, tiny.own(state)["gradient"]) if first is None else first
            if losses[-1] < goal * losses[0]:
                break
        assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))  # frozen never
        jax.tree.map(np.testing.assert_array_equal, before, frozen)
        assert step._cache_size() == 1
        if places is not None:
            jax.tree.map(lambda x, s: _lies(x, s), state, places)
        return np.array(losses), first, state

    @functools.cache  # noqa: B019
    def sgd(self, devices):
        return self.train(devices, adam=False, rate=0.01)

    @functools.cache  # noqa: B019
    def adam(self, devices):
        return self.train(devices, adam=True, rate=1e-3)


def _lies(x, wanted):
    assert x.sharding.is_equivalent_to(wanted, x.ndim)


MESHES = {
    "1": lambda: None,
    "1x8": lambda: sharding.make_mesh(data=1, fsdp=8),
    "2x4": lambda: sharding.make_mesh(data=2, fsdp=4),
}


@pytest.fixture(scope="module", params=methods.names())
def case(request):
    yield Case(request.param)
    jax.clear_caches()  # XLA maps memory for every program, and a process may have only so many maps


@functools.cache
def base_logits():
    batch = tiny.batch()
    apply = jax.jit(
        lambda p: tiny.model().apply({"params": p}, batch["tokens"], batch["positions"], batch["segment_ids"])
    )
    return apply, apply(tiny.params())


def real(logits):
    """Rows of padding are finite and mean nothing."""
    return np.asarray(logits)[tiny.batch()["segment_ids"] > 0]


def test_1_identity_at_init(case):
    text = methods.module(case.name).__doc__
    promised = re.search(r"^(Not the identity|Identity) at init", text, re.M)
    assert promised, "the file says whether it is the identity at init"
    at_init = case.logits(tree.merge(*case.start))
    if promised.group(1) == "Identity":
        assert tiny.distance(real(at_init), real(base_logits()[1])) <= 1e-6
    else:
        assert tiny.distance(real(at_init), real(base_logits()[1])) > 1e-6


def test_2_partition(case):
    frozen, trainable = (tree.flatten(half) for half in case.start)
    base = tree.flatten(tiny.params())
    assert trainable and not frozen.keys() & trainable.keys()
    assert base.keys() <= frozen.keys() | trainable.keys()
    added = (frozen.keys() | trainable.keys()) - base.keys()
    assert bool(added) == bool(case.acting)
    for path in added:  # [<place>/]<method>/<adapter>/<leaf>
        *place, name, _, _ = path.split("/")
        assert name in [m.name for m in case.acting]
        assert not place or "/".join(place) in case.sites.keys() | case.sites.blocks.keys()
    for path, leaf in trainable.items():
        assert leaf.dtype == jnp.float32 and not leaf.weak_type, path  # else the second step would compile again
    with pytest.raises(ValueError, match="both trees hold"):
        tree.merge(case.frozen, case.trainable, {**case.trainable})


def test_2_axes_name_every_leaf(case):
    """AXES is the shape's documentation and the sharding rule."""
    for path, leaf in tree.flatten(tree.merge(*case.start)).items():
        if path in tree.flatten(tiny.params()) or path.endswith("/id"):
            continue
        place, method, axes = sites.theta_of(path, case.method, case.sites)
        stack = place.stack if place else ()
        assert leaf.shape[: len(stack)] == stack
        own = dict(zip(axes, leaf.shape[len(stack) :], strict=True))
        if place is None:
            assert not {"in", "out"} & own.keys(), "no one site's sizes are those of all"
            continue
        assert own.get("in", place.shape[0]) == place.shape[0], path
        assert own.get("out", place.shape[1]) == place.shape[1], path


def test_2_init_works_on_shapes_and_count_agrees(case):
    shapes = jax.eval_shape(lambda p: case.method.init(jax.random.key(0), p, case.sites), tiny.params())
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), case.start)
    counted = sites.count(case.method, tiny.params(), case.sites)
    assert counted["trainable"] == tree.count(case.start.trainable)
    added = sum(x.size for p, x in tree.flatten(case.start.trainable).items() if p not in tree.flatten(tiny.params()))
    assert counted["total"] == tree.count(tiny.params()) + added


def test_3_fold(case):
    merged = tree.merge(case.frozen, tiny.perturb(case.start.trainable, zero=0.7))
    if case.method.fold is None:
        assert re.search("[Nn]othing folds", methods.module(case.name).__doc__), "the file says that it does not fold"
        assert tiny.distance(real(case.logits(merged)), real(base_logits()[1])) >= 0.1
        return
    folded = jax.jit(lambda p: case.method.fold(p, case.sites))(merged)
    assert tree.flatten(folded).keys() == tree.flatten(tiny.params()).keys()
    plain, base = base_logits()
    adapted = case.logits(merged)
    assert tiny.distance(real(adapted), real(plain(folded))) <= 1e-5
    assert tiny.distance(real(adapted), real(base)) >= 0.1  # there was something to fold
    before, after = tree.flatten(tiny.params()), tree.flatten(folded)
    touched = [s for s in case.sites.values() if any(f"{s.path}/{m.name}" in _heads(merged) for m in case.acting)]
    assert bool(touched) == bool(case.acting)
    for site in touched:
        w, new = site.matrix(before[site.kernel]), site.matrix(after[site.kernel])
        change = jnp.linalg.norm(new - w, axis=(1, 2)) / jnp.linalg.norm(w, axis=(1, 2))
        assert (change >= 0.1).all(), site.path
        assert len(site.layers) == 1 or tiny.distance((new - w)[0], (new - w)[1]) > 0.1
    if case.acting:
        with pytest.raises(ValueError, match="no leaves"):
            case.method.fold(folded, case.sites)


def _heads(merged):
    return {p.rsplit("/", 2)[0] for p in tree.flatten(merged)}


def test_4_trainable_leaves_only(case):
    losses, first, state = case.train(adam=True, rate=1e-3, dropout=False)
    assert tree.flatten(first).keys() == tree.flatten(case.trainable).keys()
    assert tree.count(first) == tree.count(case.trainable)
    held = tree.count(state.opt_state)  # the gradient that is kept, Adam's two moments, some counters
    assert held <= 3 * tree.count(case.trainable) + 8
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.trainable, case.trainable)
    assert all(jax.tree.leaves(moved)), [p for p, m in tree.flatten(moved).items() if not m]
    assert losses[-1] < losses[0]


def test_5_init_is_the_same_unrolled(case):
    tiny.close(tiny.unstack(tree.merge(*case.start)), tree.merge(*case.init(scan=False)), 1e-6)
    assert (
        tree.flatten(tiny.unstack(case.start.trainable)).keys() == tree.flatten(case.init(scan=False).trainable).keys()
    )


@pytest.mark.parametrize("scan, remat", [(True, "full"), (False, "none"), (False, "full")])
def test_5_scan_unrolled_remat(case, scan, remat):
    """With dropout on where there is any: masks that differed would show in the first digits."""
    if (scan, remat) == (False, "full") and case.name != methods.names()[0]:
        pytest.skip("both at once is tried once, with the first method")
    value, gradients = case.gradient()()
    other, other_gradients = case.gradient(scan, remat)()
    assert abs(value - other) <= 1e-6 * value
    tiny.close(gradients if scan else tiny.unstack(gradients), other_gradients, 1e-5)


def test_5_dropout_depends_on_its_seed(case):
    if not case.drops:
        pytest.skip(f"{case.name} has no dropout")
    values = [float(case.gradient()(seed)[0]) for seed in (0, 1)]
    values.append(float(case.gradient(dropout=False)()[0]))
    assert min(abs(a - b) for a, b in zip(values, values[1:] + values[:1], strict=True)) > 1e-3


@pytest.mark.parametrize("devices", ["1x8", "2x4"])
def test_5_devices_sgd(case, devices):
    if devices == "2x4" and case.name != methods.names()[0]:
        pytest.skip("the mesh's shape is tried once, with the first method")
    losses, first, _ = case.sgd("1")
    losses_8, first_8, _ = case.sgd(devices)
    tiny.close(first, first_8, REORDERED.get(case.name, 1e-5))
    np.testing.assert_allclose(losses_8, losses, rtol=1e-5)
    assert abs(losses[-1] - losses[0]) > 1e-3 * losses[0]


def test_5_devices_adam(case):
    losses, first, _ = case.adam("1")
    losses_8, first_8, _ = case.adam("2x4")
    tiny.close(first, first_8, REORDERED.get(case.name, 1e-5))
    np.testing.assert_allclose(losses_8, losses, rtol=1e-4)


def test_6_layers_that_are_no_targets_stay_as_they_are(case):
    """Scanned layers share leaves; those of a layer that is no target do nothing and do not train."""
    if "layers" not in methods.defaults(case.name):
        pytest.skip(f"{case.name} has no choice of layers")
    method = tiny.method(case.name, layers=[1])
    part = jax.jit(lambda key, p: method.init(key, p, case.sites))(jax.random.key(0), tiny.params())
    trainable = tiny.perturb(part.trainable)
    first = {p: x for p, x in tree.flatten(trainable).items() if p.startswith("model/layers/")}
    other = tree.unflatten({**tree.flatten(trainable), **{p: x.at[0].add(1.0) for p, x in first.items()}})

    @jax.jit
    @jax.value_and_grad
    def mean(trainable):
        total, weight = causal_lm(
            injection.inject(tiny.model().apply, method), tree.merge(part.frozen, trainable), tiny.batch()
        )
        return total / weight

    if "on" not in {p.rsplit("/", 1)[1] for p in tree.flatten(part.frozen)}:
        pytest.fail("the layer that is no target has no mark")
    assert float(mean(trainable)[0]) == float(mean(other)[0])
    gradients = tree.flatten(mean(trainable)[1])
    for path in first:
        assert not gradients[path][0].any() and gradients[path][1].any(), path
    if method.fold is not None:
        folded = jax.jit(lambda p: method.fold(p, case.sites))(tree.merge(part.frozen, trainable))
        for site in case.sites.values():
            if site.stack:
                kernel = tree.flatten(folded)[site.kernel]
                np.testing.assert_array_equal(kernel[0], tree.flatten(tiny.params())[site.kernel][0])


def test_6_a_pattern_that_matches_nothing(case):
    if "targets" not in methods.defaults(case.name):
        pytest.skip(f"{case.name} has no targets")
    method = tiny.method(case.name, targets="no_such_module")
    with pytest.raises(
        ValueError, match=f"{case.name}: (targets match no module; nearest|nothing is chosen; the leaves)"
    ):
        jax.eval_shape(lambda p: method.init(jax.random.key(0), p, case.sites), tiny.params())


def test_6_an_adapter_that_tracing_never_reached(case):
    if not case.acting:
        pytest.skip(f"{case.name} adds no leaves")
    apply, tokens = injection.inject(tiny.model().apply, case.method), jnp.zeros((1, 3), jnp.int32)
    flat, base = tree.flatten(tree.merge(*case.start)), tree.flatten(tiny.params())
    place = next(p.rsplit("/", 3)[0] for p in flat.keys() - base.keys() if p.count("/") > 2)
    lost = {p.replace(f"{place}/", f"{place}_lost/", 1) if p not in base else p: x for p, x in flat.items()}
    with pytest.raises(ValueError, match=f"never reached.*{place}_lost"):
        jax.eval_shape(apply, {"params": tree.unflatten(lost)}, tokens)
    with pytest.raises(ValueError, match="no leaves.*merge"):
        jax.eval_shape(apply, {"params": tiny.params()}, tokens)


def test_7_frozen_is_an_argument(case):
    """One compile and donation are asserted in every run of `train`; here: no weight is baked into the program."""
    state = State.create(case.trainable, optax.sgd(0.1))
    step = make_step(injection.inject(tiny.model().apply, case.method), causal_lm, optax.sgd(0.1))
    program = step.trace(state, case.frozen, tiny.batch()).jaxpr
    baked = sum(np.size(c) for c in program.consts)
    assert baked < 100


def test_8_half_precision(case):
    """A bf16 base: the loss is near the float32 one, theta's gradient is finite and float32."""
    apply = injection.inject(models.build(tiny.CONFIG, dtype=jnp.bfloat16).apply, case.method)
    base = tree.flatten(tiny.params()).keys()
    half = {p: x.astype(jnp.bfloat16) if p in base else x for p, x in tree.flatten(case.frozen).items()}

    @jax.jit
    @jax.value_and_grad
    def mean(trainable, frozen, batch):
        total, weight = causal_lm(apply, tree.merge(frozen, trainable), batch)
        return total / weight

    value, gradient = mean(case.trainable, tree.unflatten(half), tiny.batch())
    expected, _ = case.gradient(dropout=False)()
    assert abs(value - expected) <= 0.02 * expected
    for path, leaf in tree.flatten(gradient).items():
        assert leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all(), path


def test_8_what_trains_of_a_half_precision_base_is_float32(case):
    """Also leaves of the base itself, whose small steps bf16 would lose; activations keep the model's dtype."""
    model = models.build(tiny.CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    part = jax.eval_shape(lambda p: case.method.init(jax.random.key(0), p, case.sites), models.abstract(model))
    assert {x.dtype.name for x in jax.tree.leaves(part.trainable)} == {"float32"}
    apply = injection.inject(model.apply, case.method)
    logits = jax.eval_shape(lambda part: apply({"params": tree.merge(*part)}, jnp.zeros((1, 3), jnp.int32)), part)
    assert logits.dtype == jnp.bfloat16


def test_9_accumulation(case):
    """2 x 4 ragged rows and one batch of 8: sums and weights add up before the division."""
    batch = tiny.batch()
    weights = batch["weights"].reshape(2, 4, -1).sum((1, 2))
    assert weights[0] != weights[1]
    micro = {k: v.reshape(2, 4, *v.shape[1:]) for k, v in batch.items()}
    losses, first, _ = case.train(adam=False, rate=0.1, steps=1, batch=micro, accumulate=2, dropout=False)
    value, gradients = case.gradient(dropout=False)()
    assert abs(losses[0] - value) <= 1e-6 * value
    tiny.close(first, gradients, REORDERED.get(case.name, 1e-5))


def test_9_packing(case):
    value, gradients = case.gradient(dropout=False)()
    packed, packed_gradients = case.gradient(dropout=False)(batch=tiny.packed())
    assert abs(packed - value) <= 1e-6 * value
    tiny.close(gradients, packed_gradients, 1e-5)


def test_10_overfits_one_batch(case):
    """Two examples, seven tokens: even biases can learn them."""
    batch = {k: np.where(np.arange(8)[:, None] < 2, v, np.zeros_like(v)) for k, v in tiny.batch().items()}
    start = case.start.trainable
    losses, _, _ = case.train(adam=True, rate=3e-2, steps=200, goal=0.1, start=start, batch=batch, dropout=False)
    assert losses[-1] < 0.1 * losses[0], (losses[0], losses[-1])
