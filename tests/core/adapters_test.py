import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import adapters, injection, tree
from peftax.core.adapters import together
from peftax.core.method import chain
from peftax.methods.dora import dora
from peftax.methods.ia3 import ia3
from peftax.methods.lora import lora
from peftax.methods.prompt import prompt
from tests.core import toys
from tests.methods import hand


def stand(params, all_sites, *methods):
    """All of them on one tree, each perturbed."""
    for seed, method in enumerate(methods):
        part = toys.start(method, params, all_sites, seed)
        params = adapters.add(params, method, part._replace(trainable=toys.perturb(part.trainable, seed)))
    return params


@pytest.mark.parametrize("name, ones, others", [("mlp", "up", "down"), ("scan", "up", "down")])
def test_a_site_without_the_acting_adapter_is_the_plain_product(name, ones, others):
    model, params, x, all_sites = toys.found(name)
    red, blue = lora(adapter="red", rank=2, targets=[ones]), lora(adapter="blue", rank=3, targets=[others])
    both = stand(params, all_sites, red, blue)
    for method, other in ((red, blue), (blue, red)):
        alone = adapters.remove(both, other)
        assert tree.flatten(alone).keys() < tree.flatten(both).keys()
        toys.close(toys.run(model, method, both, x), toys.run(model, method, alone, x), 0)
    plain = model.apply({"params": params}, x)
    toys.close(toys.run(model, chain(), both, x), plain, 1e-6)  # disabled
    assert float(jnp.abs(toys.run(model, red, both, x) - plain).max()) > 1e-2
    removed = adapters.remove(adapters.remove(both, red), blue)
    jax.tree.map(np.testing.assert_array_equal, removed, params)


def test_together_by_hand():
    """Base [6, 5, 2]; red x A B s = 3 [1, 0, 2] 4, blue doubles the outputs: 6 + 12 + 6, 5 + 0 + 5, 2 + 24 + 2."""
    red, blue = lora(adapter="red", rank=1, alpha=4.0, targets=["layers_0"]), ia3(targets=["layers_0"], feedforward=())
    found = _hand_sites()
    params = stand(hand.PARAMS, found, red, blue)
    flat = tree.flatten(params)
    flat["layers_0/lora/red/a"] = jnp.array([[1.0], [1.0]])
    flat["layers_0/lora/red/b"] = jnp.array([[1.0, 0.0, 2.0]])
    flat["layers_0/ia3/default/l_out"] = jnp.full((1, 3), 2.0)
    params = tree.unflatten(flat)
    both = together(red, blue)
    assert injection.inject(hand.MODEL.apply, both)({"params": params}, hand.X).tolist() == [[24.0, 10.0, 28.0]]
    folded = both.fold(params, found)
    assert hand.MODEL.apply({"params": folded}, hand.X).tolist() == [[24.0, 10.0, 28.0]]
    minus = together(red, weights=[-1])  # the base without what the adapter would add
    assert injection.inject(hand.MODEL.apply, minus)({"params": params}, hand.X).tolist() == [[-6.0, 5.0, -22.0]]
    less = adapters.remove(minus.fold(params, found), blue)
    assert hand.MODEL.apply({"params": less}, hand.X).tolist() == [[-6.0, 5.0, -22.0]]


def _hand_sites():
    from peftax.core import sites

    return sites.find(hand.MODEL.apply, hand.PARAMS, hand.X)


@pytest.mark.parametrize("name", ["tied", "scan", "scanned_bank"])
def test_what_acts_together_folds_together(name):
    model, params, x, all_sites = toys.found(name)
    every = {"tied": ["embed", "mix", "lm_head"]}.get(name, "all-linear")
    some = {"tied": ["lm_head", "embed"]}.get(name, r".*down.*")
    red, blue = lora(adapter="red", rank=2, targets=every), lora(adapter="blue", rank=3, targets=some)
    green = dora(adapter="green", rank=2, targets=["mix"] if name == "tied" else some)
    params = stand(params, all_sites, red, blue, green)
    method = together(red, blue, green, weights=[1.0, -0.5, 2.0])
    y = toys.run(model, method, params, x)
    folded = toys.fold(method, params, all_sites)
    assert not [p for p in tree.flatten(folded) if "/lora/" in p or "/dora/" in p]
    plain = type(model)(tied=False) if name == "tied" else model
    toys.close(y, plain.apply({"params": folded}, x), 1e-5)
    for one in (red, blue, green):
        assert float(jnp.abs(toys.run(model, one, params, x) - y).max()) > 1e-2


def test_one_of_several_folds_and_the_others_stay():
    model, params, x, all_sites = toys.found("mlp")
    red, blue = lora(adapter="red", rank=2), lora(adapter="blue", rank=3, targets=["up"])
    both = stand(params, all_sites, red, blue)
    folded = red.fold(both, all_sites)
    toys.close(toys.run(model, blue, folded, x), toys.run(model, together(red, blue), both, x), 1e-5)


def test_refusals():
    _, params, _, all_sites = toys.found("mlp")
    red, blue = lora(adapter="red", rank=2), lora(adapter="blue", rank=2)
    part = toys.start(red, params, all_sites)
    held = adapters.add(params, red, part)
    with pytest.raises(ValueError, match="holds 'down/lora/red/a' already.*another name"):
        adapters.add(held, red, part)
    with pytest.raises(ValueError, match="no leaves of lora 'blue'"):
        adapters.remove(held, blue)
    with pytest.raises(ValueError, match="two of lora are named 'red'"):
        together(red, red)
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        together(red, blue, weights=[1.0])
    with pytest.raises(ValueError, match="prompt 'default' is no change of weights"):
        together(red, prompt(), weights=[1.0, 0.5])
    whole = lora(rank=2, targets=["up"], modules_to_save=["down"])
    with pytest.raises(ValueError, match="trains 'down/kernel' of the base itself"):
        adapters.add(params, whole, toys.start(whole, params, all_sites))
    moved = lora(rank=2, init="olora")
    with pytest.raises(ValueError, match="its start moved"):
        adapters.add(params, moved, toys.start(moved, params, all_sites))


def test_layers_and_filled_are_inverse():
    _, params, _, all_sites = toys.found("scan")
    method = lora(rank=3, rank_pattern={"1.up": 2}, targets=["up"], layers=[0, 1])
    part = toys.start(method, params, all_sites)
    numbers = adapters.layers(method, part, all_sites)
    assert {n: x["a"].shape for n, x in numbers.items()} == {"layers.0.up": (6, 3), "layers.1.up": (6, 2)}
    again = adapters.layers(method, adapters.filled(method, part, all_sites, numbers), all_sites)
    jax.tree.map(np.testing.assert_array_equal, numbers, again)


@pytest.mark.parametrize("untied", [False, True])
def test_rows_of_tokens_fold_at_a_tied_head_too(untied):
    """The head follows the table's rows: tied, or in the kernel that another adapter at the head gave it."""
    model, params, x, all_sites = toys.found("tied")
    red = lora(adapter="red", rank=2, targets=["mix"], tokens=(1, 4, 5))
    blue = lora(adapter="blue", rank=2, targets=["lm_head" if untied else "mix"])
    params = stand(params, all_sites, red, blue)
    method = together(red, blue, weights=[2.0, -0.5])
    y = toys.run(model, method, params, x)
    folded = toys.fold(method, params, all_sites)
    assert ("lm_head" in folded) == untied
    toys.close(y, type(model)(tied=not untied).apply({"params": folded}, x), 1e-5)
