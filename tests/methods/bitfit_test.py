import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from peftax import models
from peftax.core import sites, tree
from peftax.methods.bitfit import bitfit
from peftax.weights import adapters
from tests.methods import tiny


def trained(method, scan=True):
    params = tree.abstract(tiny.params(scan))
    part = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, tiny.found(scan)), params)
    return tree.flatten(part.trainable)


@pytest.mark.parametrize("scan", [True, False])
def test_every_bias_and_nothing_else(scan):
    leaves = trained(bitfit(), scan)
    assert {p.split("/")[-2] for p in leaves} == {f"{n}_proj" for n in "q k v o gate up down".split()}
    assert all(p.endswith("/bias") for p in leaves)
    assert tree.count(leaves) == tiny.LAYERS * (40 + 20 + 20 + 24 + 41 + 41 + 24)


def test_some_modules():
    assert {p.split("/")[-2] for p in trained(bitfit(targets=r".*self_attn\.[qv]_proj"))} == {"q_proj", "v_proj"}


def test_it_moves_the_bases_own_leaves():
    frozen, trainable = bitfit().init(jax.random.key(0), tiny.params(), tiny.found())
    bias = trainable["model"]["layers"]["mlp"]["up_proj"]["bias"]
    assert bias is tiny.params()["model"]["layers"]["mlp"]["up_proj"]["bias"]
    assert "bias" not in frozen["model"]["layers"]["mlp"]["up_proj"]


def test_a_model_without_biases():
    model = models.build({**tiny.CONFIG, "attention_bias": False, "mlp_bias": False})
    shapes = models.abstract(model)
    found = sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 3), "int32"))
    with pytest.raises(ValueError, match="bitfit: nothing is chosen; the leaves are named embedding, kernel, scale"):
        jax.eval_shape(lambda p: bitfit().init(jax.random.key(0), p, found), shapes)


@pytest.mark.parametrize("scan", [True, False])
def test_its_file_holds_biases_by_their_own_names(scan, tmp_path):
    """Written scanned, read scanned or unrolled: no PEFT type, PEFT's names all the same."""
    part = bitfit().init(jax.random.key(0), tiny.params(), tiny.found())
    part = part._replace(trainable=tiny.perturb(part.trainable))
    adapters.save(tmp_path / "a", part, bitfit(), tiny.found())
    tensors = load_file(tmp_path / "a" / adapters.TENSORS)
    assert len(tensors) == 7 * tiny.LAYERS
    np.testing.assert_array_equal(
        tensors["base_model.model.model.layers.1.mlp.up_proj.bias"],
        part.trainable["model"]["layers"]["mlp"]["up_proj"]["bias"][1],
    )
    method, again, _ = adapters.load(tmp_path / "a", tiny.params(scan), tiny.found(scan))
    assert method.name == "bitfit"
    trainable = part.trainable if scan else tiny.unstack(part.trainable)
    jax.tree.map(np.testing.assert_array_equal, again.trainable, trainable)
