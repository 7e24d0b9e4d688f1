import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from peftax.core import injection, sites, tree
from peftax.methods import ln_tuning as file
from peftax.methods.ln_tuning import ln_tuning
from peftax.weights import adapters
from tests.methods import llama_3b, tiny


def trained(method):
    part = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, tiny.found()), tree.abstract(tiny.params()))
    return {p: x.shape for p, x in tree.flatten(part.trainable).items()}


def test_by_hand():
    """[1, 3] is [-1, 1] when normalized; g = [2, 3] and b = [1, 0] make [-1, 3] of it."""
    model, x = nn.Sequential([nn.LayerNorm(epsilon=0.0), nn.Dense(1)]), jnp.array([[1.0, 3.0]])
    params = {
        "layers_0": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
        "layers_1": {"kernel": jnp.array([[1.0], [10.0]]), "bias": jnp.zeros(1)},
    }
    method = ln_tuning(targets=["layers_0"])
    found = sites.find(model.apply, params, x)
    frozen, trainable = method.init(jax.random.key(0), params, found)
    assert set(tree.flatten(trainable)) == {"layers_0/scale", "layers_0/bias"}
    merged = tree.merge(frozen, {"layers_0": {"scale": jnp.array([2.0, 3.0]), "bias": jnp.array([1.0, 0.0])}})
    y = injection.inject(model.apply, method)({"params": merged}, x)
    assert y.tolist() == [[pytest.approx(-1.0 + 30.0, rel=1e-5)]]
    assert model.apply({"params": method.fold(merged, found)}, x).tolist() == y.tolist()


def test_every_norm_and_nothing_else():
    assert trained(ln_tuning()) == {
        "model/layers/input_layernorm/scale": (2, 24),
        "model/layers/post_attention_layernorm/scale": (2, 24),
        "model/norm/scale": (24,),
    }
    few = ln_tuning(targets=["norm"], modules_to_save=["lm_head"])
    assert trained(few) == {"model/norm/scale": (24,), "lm_head/kernel": (24, 37)}
    assert set(trained(ln_tuning(exclude=["norm"]))) == set(trained(ln_tuning())) - {"model/norm/scale"}


def test_beside_whole_modules_the_file_names_each_its_own_way(tmp_path):
    from safetensors.numpy import load_file

    method = ln_tuning(targets=["norm"], modules_to_save=["lm_head"])
    part = method.init(jax.random.key(0), tiny.params(), tiny.found())
    part = part._replace(trainable=tiny.perturb(part.trainable))
    adapters.save(tmp_path / "a", part, method, tiny.found())
    assert set(load_file(tmp_path / "a" / adapters.TENSORS)) == {
        "base_model.model.model.norm.ln_tuning_layers.weight",
        "base_model.model.lm_head.weight",
    }
    again, loaded, _ = adapters.load(tmp_path / "a", tiny.params(), tiny.found())
    tiny.close(loaded.trainable, part.trainable, 0.0)
    assert again.config["modules_to_save"] == ("lm_head",)


def test_counts_are_those_of_pefts_run():
    """PEFT's total counts the norms twice, as it copies them."""
    config = {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm", "norm", "post_attention_layernorm"]}
    assert llama_3b.count(config) == {"trainable": 175_104, "total": 3_212_924_928 - 175_104}
    assert llama_3b.count({**config, "target_modules": ln_tuning().config["targets"]})["trainable"] == 175_104


def test_config_there_and_back():
    mine = ln_tuning(targets=["norm"], exclude=["x"]).config
    again = ln_tuning(**file.HF.read({"peft_type": "LN_TUNING", **file.HF.write(mine)})).config
    assert {**again, "modules_to_save": ()} == {**mine, "modules_to_save": ()}
