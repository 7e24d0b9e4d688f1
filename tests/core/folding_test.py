"""Folding a layer of a leaf at a time gives the bits of folding the whole tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax import methods, models
from peftax.core import adapters, folding, quantization, sites, tree
from tests.methods import tiny

QUICK = ("lora", "dora", "vera", "bitfit")  # a product, of the base's norms, leaves of all sites, the base's own
FOLDS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in methods.names()
    if tiny.method(name).fold is not None
]


def equal(method, params, found, **more):
    """Both ways, every leaf layer by layer and whole."""
    folded = method.fold(params, found)
    if more:
        folded = quantization.pack_like(folded, params)
    shapes, read = folding.by_layer(method, params, found, **more)
    assert jax.tree.structure(shapes) == jax.tree.structure(folded)
    for path, x in tree.flatten(folded).items():
        stacked = path.startswith("model/layers/") and found.stacks
        for layer in range(tiny.LAYERS) if stacked else [None]:
            wanted = x if layer is None else jax.tree.map(lambda x, i=layer: x[i], x)
            jax.tree.map(np.testing.assert_array_equal, read(path, layer), wanted)
    return read


def perturbed(method, params, found):
    part = jax.jit(lambda p: method.init(jax.random.key(0), p, found))(params)
    return tree.merge(part.frozen, tiny.perturb(part.trainable))


@pytest.mark.parametrize("name", FOLDS)
def test_every_method(name):
    method, found = tiny.method(name), tiny.found()
    equal(method, perturbed(method, tiny.params(), found), found)


def test_unrolled_layers():
    method = methods.make("lora", rank=2)
    equal(method, perturbed(method, tiny.params(scan=False), tiny.found(scan=False)), tiny.found(scan=False))


LORA = {"rank": 2, "targets": ("q_proj", "down_proj")}


@pytest.mark.parametrize("pack", [False, True])
def test_a_base_in_few_bits(pack):
    """What the method does not touch stays packed, and with `pack` what it does."""
    method, found = methods.make("lora", **LORA), tiny.found()
    packed = quantization.quantize(tiny.params(), (("q_proj|up_proj", {"fmt": "int8"}),), found)
    read = equal(method, perturbed(method, packed, found), found, **({"pack": True} if pack else {}))
    for name, still in {"self_attn/q_proj": pack, "mlp/up_proj": True}.items():
        assert tree.is_packed(read(f"model/layers/{name}/kernel", 1)) == still


def test_several_at_once():
    """Together with weights, and a chain of parts that stand at different places, modules to save among them."""
    found, params = tiny.found(), tiny.params()
    red = methods.make("lora", **LORA, adapter="red")
    blue = methods.make("loha", rank=2, targets=("q_proj", "o_proj"), adapter="blue")
    for key, method in enumerate((red, blue)):
        part = method.init(jax.random.key(key), params, found)
        params = adapters.add(params, method, part._replace(trainable=tiny.perturb(part.trainable, seed=key)))
    equal(adapters.together(red, blue, weights=[0.5, -2.0]), params, found)
    whole = methods.make("lora", **LORA, modules_to_save=("lm_head",), bias="lora_only", tokens=(3, 5))
    equal(whole, perturbed(whole, tiny.params(), found), found)


def test_leaves_that_trained_in_float32_are_as_wide_as_the_base():
    base, found, method = (
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params()),
        tiny.found(),
        methods.make("full"),
    )
    params = perturbed(method, base, found)
    shapes, read = folding.by_layer(method, params, found, like=base)
    assert {x.dtype.name for x in jax.tree.leaves(shapes)} == {"bfloat16"}
    kernel = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(read("model/layers/mlp/up_proj/kernel", 1)[None], kernel[1:].astype(jnp.bfloat16))


@pytest.mark.parametrize("targets", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_a_tied_head_is_untied(targets):
    config = {**tiny.CONFIG, "tie_word_embeddings": True}
    model = models.build(config)
    found = sites.find(model.apply, models.abstract(model), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    params = {"model": tiny.params()["model"]}
    method = methods.make("lora", rank=2, targets=targets)
    equal(method, perturbed(method, params, found), found)


def test_what_holds_nothing_to_fold():
    method = methods.make("lora", **LORA)
    with pytest.raises(ValueError, match="holds no leaves of 'lora'"):
        folding.by_layer(method, tiny.params(), tiny.found())
