"""Stacks of kernels in one module: an einsum whose x, w and y share an axis, and a module under nn.vmap."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from peftax import methods, sharding
from peftax.core import injection, sites, tree
from peftax.core.method import Ctx
from tests.core import toys

UP = "block/experts/up"


def lora(targets=r".*experts.*", **settings):
    return methods.make("lora", **{"rank": 2, "targets": targets, **settings})


def leaves(params, path=UP, method="lora"):
    """The leaves of one method at one site."""
    at = f"{path}/{method}/default/"
    return {p.removeprefix(at): x for p, x in tree.flatten(params).items() if p.startswith(at)}


def begin(name, method, seed=0):
    """(frozen, perturbed trainable)."""
    _, params, _, all_sites = toys.found(name)
    frozen, trainable = toys.start(method, params, all_sites, seed)
    return frozen, toys.perturb(trainable)


def unstacked(params):
    """Scanned layers -> numbered ones."""
    layers = params["layers"]
    return {"layers": {str(i): jax.tree.map(lambda v, i=i: v[i], layers) for i in range(3)}}


def test_names_carry_the_experts_number():
    bank, mapped, scanned = (toys.found(n)[-1] for n in ("bank", "mapped", "scanned_bank"))
    assert bank[UP].names == tuple(f"block.experts.up.{e}" for e in range(4))
    assert mapped[UP].names == tuple(f"block.experts.{e}.up" for e in range(4))
    up = scanned["layers/experts/up"]
    assert up.names == tuple(f"layers.{layer}.experts.up.{e}" for layer in range(3) for e in range(4))
    assert up.ndim == 4 and up.scanned == (3,) and up.stack == (3, 4)
    assert scanned.names("layers/experts/up/bias")[5] == "layers.1.experts.up.1.bias"
    assert scanned.by_name()["layers.2.experts.up.3"] == (up, 11)


def test_numbers_are_the_same_however_experts_and_layers_are_held():
    """Stacked and spelled out in any mixture: the same names have the same numbers, and all differ."""
    scanned, unrolled = toys.found("scanned_bank")[-1], toys.found("unrolled_bank")[-1]
    place = functools.partial(sites.Block, kind="block", shape=(1, 1), args=())
    for layer in range(3):
        own = scanned["layers/experts/up"].layers[4 * layer : 4 * layer + 4]
        assert own == unrolled[f"layers/{layer}/experts/up"].layers
        spelled = [place(path=f"layers/{layer}/experts/up/{e}", stacks={}).layers[0] for e in range(4)]
        assert list(own) == spelled
    numbers = scanned["layers/experts/up"].layers
    assert len(set(numbers)) == 12 and max(numbers) < 2**31


def test_leaves_lie_expert_by_expert():
    frozen, trainable = begin("scanned_bank", lora(dropout=0.5))
    held = leaves(tree.merge(frozen, trainable), "layers/experts/up")
    shapes = {leaf: x.shape for leaf, x in held.items()}
    assert shapes == {"a": (3, 4, 6, 2), "b": (3, 4, 2, 5), "scale": (3, 4), "id": (3, 4)}
    starts = np.asarray(held["a"]).reshape(12, -1)
    assert len(np.unique(starts[:, 0])) == 12


@pytest.mark.parametrize(
    "name, settings",
    [
        ("lora", {"rank": 2, "dropout": 0.5}),
        ("vera", {"rank": 2, "dropout": 0.5}),  # its projections are no expert's own
        ("dora", {"rank": 2, "dropout": 0.5}),
        ("ia3", {"feedforward": r".*down.*"}),
    ],
)
def test_an_einsum_is_what_vmap_is(name, settings):
    """The same tree, the same start, the same dropout, the same output and fold."""
    method = methods.make(name, targets=r".*experts.*", **settings)
    frozen, trainable = begin("bank", method)
    other = toys.start(method, *(toys.found("mapped")[i] for i in (1, 3)))
    jax.tree.map(np.testing.assert_array_equal, toys.perturb(other.trainable), trainable)
    jax.tree.map(np.testing.assert_array_equal, other.frozen, frozen)
    merged = tree.merge(frozen, trainable)
    (bank, _, x, bank_sites), (mapped, _, _, mapped_sites) = toys.found("bank"), toys.found("mapped")
    for ctx in (None, Ctx(key=jax.random.key(3))):
        one = toys.run(bank, method, merged, x, ctx=ctx)
        toys.close(one, toys.run(mapped, method, merged, x, ctx=ctx), 1e-6)
    folded = toys.fold(method, merged, bank_sites)
    toys.close(toys.run(bank, method, merged, x), bank.apply({"params": folded}, x), 1e-5)
    again = toys.fold(method, merged, mapped_sites)
    jax.tree.map(np.testing.assert_array_equal, folded, again)


@pytest.mark.parametrize("name", ["bank", "mapped"])
def test_every_experts_dropout_differs(name):
    """Equal experts, equal rows, equal leaves: what differs is the mask."""
    x = toys.found(name)[2]
    method = lora(targets=r".*up.*", dropout=0.5)
    frozen, trainable = begin(name, method)
    merged = tree.merge(frozen, trainable)["block"]["experts"]
    ids = merged["up"]["lora"]["default"].pop("id")
    merged = jax.tree.map(lambda v: jnp.broadcast_to(v[:1], v.shape), merged)
    merged["up"]["lora"]["default"]["id"] = ids
    merged = {"experts": merged}

    class Holder(nn.Module):
        @nn.compact
        def __call__(self, x):
            made = toys.Bank if name == "bank" else nn.vmap(toys.Expert, variable_axes={"params": 0})
            return made(name="experts")(jnp.broadcast_to(x[None], (4, *x.shape)))

    still = toys.run(Holder(), method, merged, x)
    moved = toys.run(Holder(), method, merged, x, ctx=Ctx(key=jax.random.key(0)))
    for e in range(1, 4):
        toys.close(still[e], still[0], 1e-6)
        assert float(jnp.abs(moved[e] - moved[0]).max()) > 1e-2


def test_init_and_dropout_are_the_same_scanned_and_unrolled():
    method = lora(dropout=0.5, targets=".*")
    scanned, x = toys.found("scanned_bank")[0], toys.found("scanned_bank")[2]
    params, all_sites = (toys.found("scanned_bank")[i] for i in (1, 3))
    one = toys.start(method, params, all_sites, 3)
    other = toys.start(method, unstacked(params), toys.found("unrolled_bank")[-1], 3)
    jax.tree.map(np.testing.assert_array_equal, unstacked(tree.merge(*one)), tree.merge(*other))
    merged = tree.merge(one.frozen, toys.perturb(one.trainable))
    ctx = Ctx(key=jax.random.key(9))
    unrolled = toys.found("unrolled_bank")[0]
    whole = toys.run(scanned, method, merged, x, ctx=ctx)
    toys.close(whole, toys.run(unrolled, method, unstacked(merged), x, ctx=ctx), 1e-6)
    toys.close(whole, toys.run(toys.Stack(block=toys.MappedMoe), method, merged, x, ctx=ctx), 1e-6)


@pytest.mark.parametrize("name, targets", [("bank", r".*up\.[13]"), ("mapped", r".*\.[13]\.up")])
def test_some_experts(name, targets):
    """The others do nothing, do not train, do not fold, and do not count."""
    model, params, x, all_sites = toys.found(name)
    method = lora(targets)
    assert sites.count(method, params, all_sites)["trainable"] == 2 * 2 * (6 + 5)
    frozen, trainable = begin(name, method)
    assert leaves(frozen)["on"].tolist() == [False, True, False, True]

    merged = tree.merge(frozen, trainable)
    folded = toys.fold(method, merged, all_sites)
    same = (folded["block"]["experts"]["up"]["kernel"] == params["block"]["experts"]["up"]["kernel"]).all((1, 2))
    assert same.tolist() == [True, False, True, False]
    toys.close(toys.run(model, method, merged, x), model.apply({"params": folded}, x), 1e-5)

    def loss(trainable):
        return jnp.sum(toys.run(model, method, tree.merge(frozen, trainable), x) ** 2)

    for leaf in leaves(jax.jit(jax.grad(loss))(trainable)).values():
        assert leaf.any((1, 2)).tolist() == [False, True, False, True]


def test_experts_of_unlike_ranks():
    model, params, x, all_sites = toys.found("bank")
    method = lora(rank_pattern={r"up\.1": 3, r"down\.\d": 1})
    assert sites.count(method, params, all_sites)["trainable"] == (3 * 2 + 3) * (6 + 5) + 4 * 1 * (5 + 6)
    frozen, trainable = toys.start(method, params, all_sites)
    assert leaves(trainable)["a"].shape == (4, 6, 3)
    assert leaves(trainable)["a"].any((1,)).sum(1).tolist() == [2, 3, 2, 2]


@pytest.mark.parametrize("name", ["bank", "scanned_bank", "mapped"])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_moves_the_base(name, start):
    model, params, x, all_sites = toys.found(name)
    method = lora(init=start)
    frozen, trainable = toys.start(method, params, all_sites)
    path = next(p for p in all_sites if p.endswith("experts/up")) + "/kernel"
    moved = (tree.flatten(frozen)[path] != tree.flatten(params)[path]).any((-1, -2))
    assert moved.all()
    toys.close(toys.run(model, method, tree.merge(frozen, trainable), x), model.apply({"params": params}, x), 1e-5)
    assert method.move is not None
    again = method.move(tree.merge(params, _own(frozen, params), trainable), all_sites)
    toys.close(tree.flatten(again)[path], tree.flatten(frozen)[path], 1e-6)


def _own(frozen, params):
    """The method's frozen leaves alone."""
    return tree.split(frozen, lambda path: path not in tree.flatten(params))[1]


def test_biases_of_targeted_experts():
    _, params, _, all_sites = toys.found("bank")
    trained = tree.flatten(toys.start(lora(bias="lora_only"), params, all_sites).trainable)
    assert "block/experts/up/bias" in trained and "block/router/bias" not in trained
    with pytest.raises(ValueError, match=r"experts/up/bias.*2 of 4"):
        lora(r".*up\.[13]", bias="lora_only").init(jax.random.key(0), params, all_sites)


def test_names_in_the_error():
    _, params, _, all_sites = toys.found("bank")
    with pytest.raises(ValueError, match=r"match no module; nearest to 'block.expert.up': 'block\.experts\.up"):
        lora("block.expert.up").init(jax.random.key(0), params, all_sites)


@pytest.mark.parametrize(
    "kernel, a, b",
    [
        (("fsdp", None, None), ("fsdp", None, None), ("fsdp", None, None)),  # experts over devices
        ((None, "fsdp", None), (None, "fsdp", None), (None, None, None)),
        ((None, None, "fsdp"), (None, None, None), (None, None, "fsdp")),
    ],
)
def test_leaves_lie_as_their_kernels(kernel, a, b):
    mesh = sharding.make_mesh(data=8, fsdp=1)
    _, params, _, all_sites = toys.found("bank")
    base = sharding.base_specs(params, all_sites, mesh, rules=[(f"{UP}/kernel", kernel)])
    spec = functools.partial(sharding.theta_spec, method=lora(), sites=all_sites, base=base, mesh=mesh)
    assert spec(f"{UP}/lora/default/a", (4, 6, 2)) == PartitionSpec(*a)
    assert spec(f"{UP}/lora/default/b", (4, 2, 5)) == PartitionSpec(*b)
    assert spec(f"{UP}/lora/default/id", (4,)) == PartitionSpec(kernel[0])


def test_experts_over_devices_compute_the_same():
    model, params, x, all_sites = toys.found("scanned_bank")
    mesh = sharding.make_mesh(data=2, fsdp=4)
    method = lora(".*")
    frozen, trainable = begin("scanned_bank", method)
    rules = [("experts/.*/kernel", (None, "fsdp", None, None))]
    base = sharding.base_specs(params, all_sites, mesh, rules=rules)
    merged = tree.merge(frozen, trainable)
    lie = sharding.shardings(merged, method, all_sites, base, mesh)
    assert lie["layers"]["experts"]["up"]["lora"]["default"]["a"].spec[1] == "fsdp"
    apply = injection.inject(model.apply, method, rows=NamedSharding(mesh, sharding.BATCH))
    spread = jax.jit(lambda p, x: apply({"params": p}, x))(jax.device_put(merged, lie), x)
    toys.close(spread, toys.run(model, method, merged, x), 1e-6)


class Within(nn.Module):
    """Modules mapped at a path that is a stack already."""

    inner: str

    @nn.compact
    def __call__(self, x):
        each = functools.partial(nn.vmap, variable_axes={"params": 0}, split_rngs={"params": True})
        if self.inner == "einsum":
            return each(nn.Einsum)((4, 3, 5), "ED,EDF->EF", name="up")(x)
        return each(each(nn.Dense))(5, name="up")(x)


@pytest.mark.parametrize("inner, message", [("einsum", "'up' holds a stack.*mapped"), ("dense", "'up'.*mapped twice")])
def test_two_stacks_at_one_path_are_refused(inner, message):
    model, x = Within(inner), jnp.ones((2, 4, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match=message):
        sites.find(model.apply, params, x)
