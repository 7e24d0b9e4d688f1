import jax
import numpy as np
import pytest

from peftax.weights import names


def leaf(path, *shape):
    tree = jax.ShapeDtypeStruct(shape, np.float32)
    for part in reversed(path.split("/")):
        tree = {part: tree}
    (only,) = names.walk(tree)
    return only


@pytest.mark.parametrize(
    ("path", "layer", "name"),
    [
        ("model/layers/self_attn/q_proj", 3, "model.layers.3.self_attn.q_proj"),
        ("model/layers/self_attn/q_proj/kernel", 3, "model.layers.3.self_attn.q_proj.weight"),
        ("model/layers/12/mlp/up_proj/bias", None, "model.layers.12.mlp.up_proj.bias"),
        ("model/layers/input_layernorm/scale", 0, "model.layers.0.input_layernorm.weight"),
        ("model/embed_tokens/embedding", None, "model.embed_tokens.weight"),
        ("embeddings/cls_token", None, "embeddings.cls_token"),
        ("lm_head", None, "lm_head"),
        ("bert/encoder/layer/output/dense/kernel", 1, "bert.encoder.layer.1.output.dense.weight"),
        ("model/layers", None, "model.layers"),
    ],
)
def test_to_hf(path, layer, name):
    assert names.to_hf(path, layer=layer) == name


@pytest.mark.parametrize("path, layer", [("model/layers/mlp", None), ("model/layers/0/mlp", 0)])
def test_a_layer_for_stacked_paths_only(path, layer):
    with pytest.raises(ValueError, match=path):
        names.to_hf(path, layer=layer)


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("name", ["model.layers.3.self_attn.q_proj", "lm_head", "model.layers"])
def test_from_hf_inverts(name, scanned):
    path, layer = names.from_hf(name, scanned=scanned)
    assert names.to_hf(path, layer=layer) == name
    assert (layer == 3) == (scanned and "3" in name)


@pytest.mark.parametrize(
    ("path", "shape", "stored"),
    [
        ("proj/kernel", (3, 5), (5, 3)),
        ("layers/proj/kernel", (2, 3, 5), (5, 3)),
        ("conv/kernel", (7, 3, 5), (5, 3, 7)),
        ("conv/kernel", (7, 11, 3, 5), (5, 3, 7, 11)),
        ("norm/scale", (5,), (5,)),
        ("norm/bias", (5,), (5,)),
        ("table/embedding", (9, 4), (9, 4)),
        ("layers/1/proj/kernel", (3, 5), (5, 3)),
    ],
)
def test_axes(path, shape, stored):
    it = leaf(path, *shape)
    assert it.tensor_shape == stored
    part = np.arange(np.prod(shape)).reshape(shape)[0 if it.stacked else ...]
    assert it.to_file(part).shape == stored
    np.testing.assert_array_equal(it.to_tree(it.to_file(part)), part)


def test_conv_is_torchs():
    kernel = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    stored = leaf("conv/kernel", 2, 3, 4, 5).to_file(kernel)
    assert stored[4, 3, 1, 2] == kernel[1, 2, 3, 4]


def test_stacked_leaf_has_a_name_per_layer():
    it = leaf("model/layers/mlp/up_proj/kernel", 2, 3, 5)
    assert it.names == tuple(f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))
