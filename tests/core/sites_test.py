import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax import methods
from peftax.core import injection, lift, sites, tree, views
from peftax.core.method import Ctx, chain
from peftax.methods.lora import lora
from tests.core import toys

MODELS = sorted(toys.ALL)


found = toys.found

# path -> (kind, [in, out], the kernel's leaf, has a bias, stack)
EXPECTED = {
    "mlp": {
        "up": ("linear", (5, 7), "up/kernel", True, ()),
        "down": ("linear", (7, 3), "down/kernel", False, ()),
    },
    "general": {
        "split": ("linear", (5, 10), "split/kernel", True, ()),
        "both": ("linear", (10, 6), "both/kernel", True, ()),
        "across": ("linear", (6, 4), "across/kernel", False, ()),
    },
    "gemma": {
        "q_einsum": ("linear", (6, 8), "q_einsum/kernel", False, ()),
        "out_einsum": ("linear", (8, 6), "out_einsum/kernel", False, ()),
    },
    "encoder": {
        **{f"attention/{n}": ("linear", (6, 6), f"attention/{n}/kernel", True, ()) for n in ("query", "key", "value")},
        "attention/out": ("linear", (6, 6), "attention/out/kernel", True, ()),
        "out": ("linear", (6, 5), "out/kernel", True, ()),
    },
    "cnn": {
        "first": ("conv", (18, 5), "first/kernel", True, ()),
        "second": ("conv", (20, 4), "second/kernel", False, ()),
        "head": ("linear", (4, 3), "head/kernel", True, ()),
    },
    "tied": {
        "embed": ("embed", (11, 6), "embed/embedding", False, ()),
        "mix": ("linear", (6, 6), "mix/kernel", True, ()),
        "lm_head": ("head", (6, 11), "embed/embedding", False, ()),
    },
    "attend": {
        "embed": ("embed", (11, 6), "embed/embedding", False, ()),
        "embed/attend": ("head", (6, 11), "embed/embedding", False, ()),
    },
    "scan": {
        "layers/up": ("linear", (6, 9), "layers/up/kernel", True, (3,)),
        "layers/down": ("linear", (9, 6), "layers/down/kernel", True, (3,)),
    },
    "unrolled": {
        f"layers/{i}/{n}": ("linear", shape, f"layers/{i}/{n}/kernel", True, ())
        for i in range(3)
        for n, shape in (("up", (6, 9)), ("down", (9, 6)))
    },
}


def moe(at, stack):
    """Experts stand the same whether their axis is an einsum's or nn.vmap's."""
    return {
        f"{at}/router": ("linear", (6, 4), f"{at}/router/kernel", True, stack),
        f"{at}/experts/up": ("linear", (6, 5), f"{at}/experts/up/kernel", True, (*stack, 4)),
        f"{at}/experts/down": ("linear", (5, 6), f"{at}/experts/down/kernel", False, (*stack, 4)),
    }


EXPECTED |= {
    "bank": moe("block", ()),
    "mapped": moe("block", ()),
    "scanned_bank": moe("layers", (3,)),
    "scanned_mapped": moe("layers", (3,)),
    "unrolled_bank": moe("layers/0", ()) | moe("layers/1", ()) | moe("layers/2", ()),
}


@pytest.mark.parametrize("name", MODELS)
def test_finds(name):
    *_, all_sites = found(name)
    got = {p: (s.kind, s.shape, s.kernel, s.bias is not None, s.stack) for p, s in all_sites.items()}
    assert got == EXPECTED[name]


def test_finding_computes_nothing():
    model, params, x = toys.build("scan")
    shapes = tree.abstract(params)
    assert sites.find(model.apply, shapes, jax.ShapeDtypeStruct(x.shape, x.dtype)) == sites.find(model.apply, params, x)


def test_names_are_huggingfaces_scanned_or_not():
    scanned, unrolled = found("scan")[-1], found("unrolled")[-1]
    assert scanned["layers/up"].names == ("layers.0.up", "layers.1.up", "layers.2.up")
    assert set(scanned.by_name()) == set(unrolled.by_name())
    assert scanned.by_name()["layers.2.up"] == (scanned["layers/up"], 2)
    assert {s.template for s in scanned.values()} == {s.template for s in unrolled.values()}
    assert scanned["layers/up"].layers == (0, 1, 2) and unrolled["layers/2/up"].layers == (2,)
    assert scanned.names("layers/up/bias") == ("layers.0.up.bias", "layers.1.up.bias", "layers.2.up.bias")
    assert scanned["layers/up"].ndim == 3


def test_names_under_two_scans():
    names = sites.hf_names("outer/inner/up", {"outer": 2, "outer/inner": 3})
    assert names[0] == "outer.0.inner.0.up" and names[-1] == "outer.1.inner.2.up" and len(names) == 6


@pytest.mark.parametrize("name", MODELS)
def test_matrix_and_back(name):
    _, params, _, all_sites = found(name)
    flat = tree.flatten(params)
    for site in all_sites.values():
        kernel = flat[site.kernel]
        matrix = site.matrix(kernel)
        assert matrix.shape == (len(site.layers), *site.shape)
        np.testing.assert_array_equal(site.unmatrix(matrix, kernel.shape), kernel)


@pytest.mark.parametrize("name", MODELS)
def test_inject_sees_the_products_that_the_model_computes(name):
    """x @ w + b by views is the module's own result, and LoRA at init is the identity."""
    model, params, x, all_sites = found(name)
    method = lora(targets=".*", rank=2)
    frozen, trainable = toys.start(method, params, all_sites)
    adapted = toys.run(model, method, tree.merge(frozen, trainable), x)
    toys.close(adapted, model.apply({"params": params}, x), 1e-5 if name == "cnn" else 1e-6)
    held = {p.split("/lora/")[0] for p in tree.flatten(trainable)}
    assert held == set(all_sites)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("tied", "attend")])
def test_fold_law(name):
    model, params, x, all_sites = found(name)
    method = lora(targets=".*", rank=2)
    frozen, trainable = toys.start(method, params, all_sites)
    merged = tree.merge(frozen, toys.perturb(trainable))
    adapted = toys.run(model, method, merged, x)
    folded = toys.fold(method, merged, all_sites)
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    toys.close(adapted, model.apply({"params": folded}, x), 1e-5)
    before, after = tree.flatten(params), tree.flatten(folded)
    for site in all_sites.values():
        w, new = site.matrix(before[site.kernel]), site.matrix(after[site.kernel])
        change = jnp.linalg.norm(new - w, axis=(1, 2)) / jnp.linalg.norm(w, axis=(1, 2))
        assert (change > 0.1).all()
    with pytest.raises(ValueError, match="no leaves"):
        method.fold(folded, all_sites)


@pytest.mark.parametrize("targets", [["embed"], ["lm_head"], ["embed", "lm_head"]])
def test_folding_a_tied_site_unties(targets):
    model, params, ids, all_sites = found("tied")
    method = lora(targets=targets, rank=2)
    frozen, trainable = toys.start(method, params, all_sites)
    merged = tree.merge(frozen, toys.perturb(trainable))
    adapted = toys.run(model, method, merged, ids)
    folded = toys.fold(method, merged, all_sites)
    toys.close(adapted, toys.Tied(tied=False).apply({"params": folded}, ids), 1e-5)
    moved = (folded["embed"]["embedding"] != params["embed"]["embedding"]).any()
    assert moved == ("embed" in targets)
    moved = (folded["lm_head"]["kernel"] != params["embed"]["embedding"].T).any()
    assert moved == ("lm_head" in targets)


def test_folding_elsewhere_leaves_the_tie():
    _, params, _, all_sites = found("tied")
    method = lora(targets=["mix"])
    folded = method.fold(tree.merge(*toys.start(method, params, all_sites)), all_sites)
    assert jax.tree.structure(folded) == jax.tree.structure(params)


@pytest.mark.parametrize("targets", [["embed"], ["attend"], ["embed", "attend"]])
def test_folding_a_head_inside_the_tables_module(targets):
    model, params, ids, all_sites = found("attend")
    method = lora(targets=targets, rank=2)
    frozen, trainable = toys.start(method, params, all_sites)
    merged = tree.merge(frozen, toys.perturb(trainable))
    adapted = toys.run(model, method, merged, ids)
    folded = toys.fold(method, merged, all_sites)["embed"]
    toys.close(adapted, nn.tanh(folded["embedding"][ids]) @ folded["attend"]["kernel"], 1e-5)


def test_conv_patches_stand_in_the_kernels_order():
    """A LoRA of full rank set to a known ΔW acts as that convolution."""
    model, params, x, all_sites = found("cnn")
    method = lora(targets=["first"], rank=5, alpha=5.0)
    frozen, trainable = toys.start(method, params, all_sites)
    delta = jax.random.normal(jax.random.key(5), params["first"]["kernel"].shape)
    leaves = trainable["first"]["lora"]["default"]
    leaves["a"], leaves["b"] = delta.reshape(-1, 5), jnp.eye(5)
    adapted = toys.run(model, method, tree.merge(frozen, trainable), x)
    moved = {**params, "first": {**params["first"], "kernel": params["first"]["kernel"] + delta}}
    toys.close(adapted, model.apply({"params": moved}, x), 1e-5)


def test_init_is_the_same_scanned_and_unrolled():
    _, _, _, all_sites = found("scan")
    scanned = found("scan")
    layers = scanned[1]["layers"]
    unrolled = {"layers": {str(i): jax.tree.map(lambda v, i=i: v[i], layers) for i in range(3)}}
    method = lora(rank=2)
    one = tree.merge(*toys.start(method, scanned[1], all_sites, 3))["layers"]
    other = tree.merge(*toys.start(method, unrolled, found("unrolled")[-1], 3))["layers"]
    for i in range(3):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda v, i=i: v[i], one), other[str(i)])


# --- layers of one scan that differ ---------------------------------------------------------------


def test_some_layers_under_a_scan():
    model, params, x, all_sites = found("scan")
    method = lora(targets=["up"], layers=[1], rank=2)
    frozen, trainable = toys.start(method, params, all_sites)
    assert trainable["layers"]["up"]["lora"]["default"]["a"].shape == (3, 6, 2)
    assert frozen["layers"]["up"]["lora"]["default"]["on"].tolist() == [False, True, False]

    def loss(trainable):
        merged = tree.merge(frozen, trainable)
        return jnp.sum(toys.run(model, method, merged, x) ** 2)

    gradient = jax.jit(jax.grad(loss))(trainable)["layers"]["up"]["lora"]["default"]
    assert gradient["b"][1].any() and not gradient["b"][0].any() and not gradient["b"][2].any()
    merged = tree.merge(frozen, toys.perturb(trainable))
    folded = toys.fold(method, merged, all_sites)["layers"]["up"]["kernel"]
    same = (folded == params["layers"]["up"]["kernel"]).all((1, 2))
    assert same.tolist() == [True, False, True]


def test_a_selection_of_layers_inside_one_array_is_refused():
    _, params, _, all_sites = found("scan")
    method = lift.select("some", lambda name: name == "layers.1.up.bias")
    with pytest.raises(ValueError, match=r"layers/up/bias.*1 of 3.*scan=False"):
        toys.start(method, params, all_sites)
    _, params, _, all_sites = found("unrolled")
    part = toys.start(method, params, all_sites)
    assert list(tree.flatten(part.trainable)) == ["layers/1/up/bias"]


# --- count ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scan", "unrolled"])
def test_count_uses_real_ranks(name):
    _, params, _, all_sites = found(name)
    method = lora(targets=["up"], rank=2, rank_pattern={"1.up": 4})
    counted = sites.count(method, tree.abstract(params), all_sites)
    assert counted["trainable"] == (2 + 4 + 2) * (6 + 9)
    assert counted["total"] == tree.count(params) + counted["trainable"]


def test_count_of_moved_leaves():
    _, params, _, all_sites = found("mlp")
    method = lift.select("biases", lambda name: name.endswith(".bias"))
    assert sites.count(method, params, all_sites) == {"trainable": 7, "total": tree.count(params)}


# --- what inject refuses --------------------------------------------------------------------------


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(6, name="down")(nn.Dense(9, name="up")(x)), None


@pytest.mark.parametrize("axis, length", [(1, 3), (-1, 6)])
def test_layers_along_another_axis_are_refused(axis, length):
    """Also where one leaf's sizes agree: down's bias is [6, 6] either way."""

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            of = {"variable_axes": {"params": axis}, "split_rngs": {"params": True}, "length": length}
            return nn.scan(Layer, **of)(name="layers")(x, None)[0]

    x = jnp.zeros((2, 6))
    shapes = jax.eval_shape(Stack().init, jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match=r"'layers/.*another axis than the first.*\"params\": 0"):
        sites.find(Stack().apply, shapes, x)


def test_a_pattern_that_matches_nothing_names_sites():
    _, params, _, all_sites = found("mlp")
    with pytest.raises(ValueError, match=r"nearest to 'upp': 'up'"):
        lora(targets=["upp"]).init(jax.random.key(0), params, all_sites)


def test_inject_without_theta():
    model, params, x = toys.build("mlp")
    with pytest.raises(ValueError, match=r"no leaves of lora.*merge"):
        injection.inject(model.apply, lora())({"params": params}, x)


def test_an_adapter_that_is_never_reached():
    model, params, x, all_sites = found("mlp")
    method = lora(rank=2)
    merged = tree.merge(*toys.start(method, params, all_sites))
    merged["upp"] = {"lora": merged["up"]["lora"]}
    with pytest.raises(ValueError, match=r"never reached 'upp/lora/default' \(1 of 3 adapters\).*'up/lora/default'"):
        toys.run(model, method, merged, x)


def test_an_adapter_of_another_name():
    model, params, x, all_sites = found("mlp")
    merged = tree.merge(*lora(adapter="blue").init(jax.random.key(0), params, all_sites))
    with pytest.raises(ValueError, match="no leaves of lora 'red'; they hold blue"):
        injection.inject(model.apply, lora(adapter="red"))({"params": merged}, x)


def test_an_error_inside_a_product_names_its_site():
    model, params, x, all_sites = found("mlp")
    merged = tree.merge(*lora(rank=2).init(jax.random.key(0), params, all_sites))
    leaves = merged["down"]["lora"]["default"]
    leaves["a"] = leaves["a"][:-1]
    with pytest.raises(ValueError, match="does not contract") as error:
        injection.inject(model.apply, lora(rank=2))({"params": merged}, x)
    assert "at site 'down'" in error.value.__notes__


def test_inject_works_inside_jit_and_after_the_plain_model_was_compiled():
    model, params, x, all_sites = found("mlp")
    plain = jax.jit(lambda p, x: model.apply({"params": p}, x))
    base = plain(params, x)
    method = lora(rank=2)
    frozen, trainable = toys.start(method, params, all_sites)
    merged = tree.merge(frozen, toys.perturb(trainable))
    seen = jax.jit(lambda p, x: toys.run(model, method, p, x))(merged, x)
    assert float(jnp.abs(seen - base).max()) > 1e-2
    toys.close(plain(params, x), base, 0)


# --- what users add -------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A user's own product: x @ (w * 2)."""

    @nn.compact
    def __call__(self, x):
        return x @ (self.param("w", nn.initializers.lecun_normal(), (x.shape[-1], 4)) * 2.0)


class Mine(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(Scaled(name="scaled")(x))


def test_a_registered_module_is_a_site(monkeypatch):
    monkeypatch.setattr(views, "_VIEWS", dict(views._VIEWS))
    x = jnp.ones((2, 5))
    params = toys.numbers(jax.eval_shape(Mine().init, jax.random.key(0), x)["params"])
    assert set(sites.find(Mine().apply, params, x)) == {"out"}

    def view(module, method_name, args, kwargs):
        same = lambda v: v  # noqa: E731
        return views.View("linear", "w", None, (0, 1), 1, lambda x: x * 2.0, same)

    sites.register(Scaled, view)
    all_sites = sites.find(Mine().apply, params, x)
    assert all_sites["scaled"].shape == (5, 4)
    method = lora(targets=["scaled"], rank=2)
    frozen, trainable = toys.start(method, params, all_sites)
    merged = tree.merge(frozen, toys.perturb(trainable))
    adapted = injection.inject(Mine().apply, method)({"params": merged}, x)
    toys.close(adapted, Mine().apply({"params": method.fold(merged, all_sites)}, x), 1e-5)


def test_a_subclass_is_its_parents_site():
    class Own(nn.Dense):
        pass

    class Holder(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Own(3, name="own")(x)

    x = jnp.ones((2, 5))
    params = jax.eval_shape(Holder().init, jax.random.key(0), x)["params"]
    assert set(sites.find(Holder().apply, params, x)) == {"own"}


class Rooted(nn.Module):
    """Parameters of the model itself, as a vision transformer's positions are."""

    @nn.compact
    def __call__(self, x):
        x = x + self.param("positions", nn.initializers.normal(1.0), (1, x.shape[-1]))
        return nn.Dense(3, name="out")(x) + self.param("bias", nn.initializers.zeros, (1, 3))


@pytest.mark.parametrize("settings", [{}, {"bias": "all"}, {"modules_to_save": ["out"], "targets": "all-linear"}])
def test_parameters_at_the_root(settings):
    x = jnp.ones((2, 5))
    params = toys.numbers(jax.eval_shape(Rooted().init, jax.random.key(0), x)["params"])
    all_sites = sites.find(Rooted().apply, params, x)
    assert list(all_sites) == ["out"]
    if "modules_to_save" in settings:
        with pytest.raises(ValueError, match="the model has out"):
            lora(**settings).init(jax.random.key(0), params, all_sites)
        return
    trainable = tree.flatten(lora(**settings).init(jax.random.key(0), params, all_sites).trainable)
    assert ("bias" in trainable) == ("out/bias" in trainable) == bool(settings)
    assert methods.make("full").init(jax.random.key(0), params, all_sites).trainable == params
    biases = methods.make("bitfit").init(jax.random.key(0), params, all_sites).trainable
    assert set(tree.flatten(biases)) == {"bias", "out/bias"}


def test_two_adapters_stand_on_one_base():
    model, params, x, all_sites = found("mlp")
    red, blue = lora(adapter="red", rank=2), lora(adapter="blue", rank=3)
    frozen, first = toys.start(red, params, all_sites)
    frozen, second = toys.start(blue, frozen, all_sites, 1)
    merged = tree.merge(frozen, toys.perturb(first, 1), toys.perturb(second, 2))
    one = toys.run(model, red, merged, x)
    other = toys.run(model, blue, merged, x)
    alone = {k: {**v, "lora": {"red": v["lora"]["red"]}} for k, v in merged.items()}
    toys.close(one, toys.run(model, red, alone, x), 0)
    assert float(jnp.abs(one - other).max()) > 1e-2


def test_two_methods_at_one_site_are_refused():
    model, params, x, all_sites = found("mlp")
    other = lift.per_kernel(
        "other",
        init=lambda key, k: {"trainable": {"s": jnp.ones(())}},
        call=lambda theta, x, k, ctx: x @ k.w * theta["s"],
        fold=lambda theta, k: k.replace(w=k.w * theta["s"]),
        axes={"s": ()},
        settings=lambda name, kind: {} if name == "down" else None,
    )
    both = chain(lora(rank=2), other)
    merged = tree.merge(*toys.start(both, params, all_sites))
    with pytest.raises(ValueError, match="lora and other meet at 'down'"):
        injection.inject(model.apply, both)({"params": merged}, x)


def test_dropout_keys_differ_by_site_and_layer_and_agree_between_scan_and_unrolled():
    model, params, x, all_sites = found("scan")
    method = lora(rank=2, dropout=0.5)
    frozen, trainable = toys.start(method, params, all_sites)
    merged = tree.merge(frozen, toys.perturb(trainable))
    key = jax.random.key(9)
    scanned = toys.run(model, method, merged, x, ctx=Ctx(key=key))
    layers = merged["layers"]
    unrolled = {"layers": {str(i): jax.tree.map(lambda v, i=i: v[i], layers) for i in range(3)}}
    other = toys.run(toys.Stack(scan=False), method, unrolled, x, ctx=Ctx(key=key))
    toys.close(scanned, other, 1e-6)
    for ctx in (None, Ctx(key=jax.random.key(8))):  # no key: no dropout
        assert float(jnp.abs(scanned - toys.run(model, method, merged, x, ctx=ctx)).max()) > 1e-2


def test_chain_of_kernels_and_leaves():
    _, params, _, all_sites = found("mlp")
    biases = lift.select("biases", lambda name: name.endswith(".bias"))
    both = chain(lora(rank=2), biases)
    part = toys.start(both, params, all_sites)
    assert "up/bias" in tree.flatten(part.trainable) and "up/lora/default/a" in tree.flatten(part.trainable)
    with pytest.raises(ValueError, match="biases and biases both train .up/bias."):
        twice = dataclasses.replace(biases, init=lambda k, p, s: biases.init(k, params, s))
        chain(biases, twice).init(jax.random.key(0), params, all_sites)


class Named(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="down")(nn.tanh(nn.Dense(7, name="up")(inputs=x)))


@pytest.mark.parametrize("targets", [["up"], ["down"]])
def test_a_module_that_is_called_by_name(targets):
    _, params, x, _ = found("mlp")
    params = {**params, "down": {**params["down"], "bias": jnp.ones(3)}}
    model, method = Named(), lora(targets=targets, rank=2)
    all_sites = sites.find(model.apply, params, x)
    part = toys.start(method, params, all_sites)
    merged = tree.merge(part.frozen, toys.perturb(part.trainable))
    y = toys.run(model, method, merged, x)
    toys.close(y, model.apply({"params": toys.fold(method, merged, all_sites)}, x), 1e-5)
    assert float(jnp.abs(y - model.apply({"params": params}, x)).max()) > 1e-2
