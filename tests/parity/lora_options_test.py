"""LoRA's options one by one: folders that Hugging Face PEFT writes, read here, and written again for PEFT."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch", reason="torch lives in the parity venv")

import peft  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from peftax import models, weights  # noqa: E402
from peftax.core import hf, injection, sites, tree  # noqa: E402
from peftax.core.hf import Unsupported  # noqa: E402
from peftax.weights import adapters  # noqa: E402

pytestmark = pytest.mark.parity
IDS = np.random.default_rng(0).integers(0, 23, (2, 6)).astype(np.int32)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    """(folder, our model, parameters, sites) of a Llama with biases and three layers."""
    return opened(tmp_path_factory.mktemp("base"), request.param)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("base"), False)


def opened(folder, tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=tied,
    )
    theirs = LlamaForCausalLM(config)
    randomize(theirs, lambda name: True, 0.25)
    theirs.save_pretrained(folder)
    source = weights.open(folder)
    model = models.build(source.config)
    shapes = models.abstract(model)
    found = sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    return folder, model, weights.load(source, shapes), found


def randomize(model, chosen, std):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if chosen(name):
                parameter += std * torch.randn_like(parameter)


def wrapped(folder, **settings):
    """PEFT's model with random values in all that trains."""
    theirs = LlamaForCausalLM.from_pretrained(folder)
    settings = {"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings))
    trained = {name for name, p in theirs.named_parameters() if p.requires_grad}
    torch.manual_seed(1)
    randomize(theirs, lambda name: name in trained, 0.3)
    return theirs.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits.numpy()


def there_and_back(base, tmp_path, **settings):
    """What PEFT writes gives PEFT's logits here; what we write of it is that file, and gives them in PEFT."""
    folder, model, params, found = base
    theirs = wrapped(folder, **settings)
    expect = logits(theirs)
    theirs.save_pretrained(tmp_path / "a")
    method, part, raw = adapters.load(tmp_path / "a", params, found)
    ours = np.asarray(injection.inject(model.apply, method)({"params": tree.merge(*part)}, IDS))
    effect = np.abs(expect - logits(LlamaForCausalLM.from_pretrained(folder))).max()
    assert effect > 0.05
    np.testing.assert_allclose(ours, expect, atol=2e-5 * max(1, np.abs(expect).max()))

    adapters.save(tmp_path / "b", part, method, found, extra={**raw, "a_field_of_tomorrow": 7}, base=str(folder))
    mine, file = (load_file(tmp_path / f / adapters.TENSORS) for f in "ba")
    for key in mine:
        np.testing.assert_array_equal(mine[key], file[key], err_msg=key)
    assert all(key.endswith("base_layer.weight") for key in file if key not in mine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), tmp_path / "b")
    np.testing.assert_allclose(logits(again.eval()), expect, atol=1e-6 * max(1, np.abs(expect).max()))
    raw_again = adapters.read_config(tmp_path / "b")[2]
    assert raw_again["a_field_of_tomorrow"] == 7
    return method, part, theirs, raw_again


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"], "lora_bias": True},
        {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": ["v_proj"], "layers_to_transform": 1, "layers_pattern": ["h", "layers"]},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj", "1.mlp.up_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.[02]\.self_attn\.q_proj"},
        {
            "target_modules": "all-linear",
            "rank_pattern": {r"\d\.self_attn\.[qk]_proj": 3, "q_proj": 1, "^model.layers.2.mlp.up_proj": 4},
            "alpha_pattern": {"down_proj": 9, r"layers\.[01]\..*": 2},  # a file sorts them
        },
        {"target_modules": ["q_proj"], "fan_in_fan_out": True},  # of a Linear: PEFT sets it right
        {"target_modules": [], "target_parameters": ["q_proj.weight", "1.mlp.down_proj.weight"]},
        {"target_modules": ["k_proj"], "target_parameters": ["q_proj.weight"], "rank_pattern": {"q_proj.weight": 5}},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["model.norm"]},
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True},
        {
            "target_modules": ["q_proj"],
            "use_dora": True,
            "trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [9]},
        },
    ],
    ids=lambda s: "-".join(k for k in s if k != "target_modules") or "embed",
)
def test_options(untied, tmp_path, settings):
    method, _, theirs, raw = there_and_back(untied, tmp_path, **settings)
    trained = sum(p.numel() for name, p in theirs.named_parameters() if p.requires_grad)
    assert sites.count(method, untied[2], untied[3])["trainable"] == trained
    assert raw["megatron_core"] == "megatron.core"


def test_a_bias_on_b_folds_into_the_modules(untied, tmp_path):
    folder, model, params, found = untied
    method, part, theirs, _ = there_and_back(untied, tmp_path, target_modules=["q_proj", "up_proj"], lora_bias=True)
    folded = method.fold(tree.merge(*part), found)
    expect = logits(theirs.merge_and_unload())
    np.testing.assert_allclose(model.apply({"params": folded}, IDS), expect, atol=2e-5 * np.abs(expect).max())


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["model.norm"]}], ids=str
)
def test_a_tied_table_that_trains_whole(base, tmp_path, settings):
    """PEFT keeps the head at the old table unless the adapter says ensure_weight_tying; here it is one leaf."""
    folder, _, params, found = base
    settings = {"target_modules": ["q_proj"], **settings}
    tied = _config_of(folder)["tie_word_embeddings"] and settings["modules_to_save"] == ["embed_tokens"]
    if tied:
        wrapped(folder, **settings).save_pretrained(tmp_path / "apart")
        with pytest.raises(Unsupported, match=r"embed_tokens/embedding.*ensure_weight_tying.*untie the base"):
            adapters.load(tmp_path / "apart", params, found)
    raw = there_and_back(base, tmp_path, **settings, ensure_weight_tying=tied)[-1]
    assert raw["ensure_weight_tying"] == tied


def _config_of(folder):
    return weights.open(folder).config


def test_tied_factors_are_refused(base, tmp_path):
    folder, _, params, found = base
    theirs = wrapped(folder, target_modules=["embed_tokens"], ensure_weight_tying=True)
    theirs.save_pretrained(tmp_path / "a")
    with pytest.raises(Unsupported, match="ensure_weight_tying and '.*embed_tokens'.*nearest is modules_to_save"):
        adapters.load(tmp_path / "a", params, found)


def test_every_field_of_peft_has_a_place_here():
    """Read, refused when it is set, or of no weight: a field of a newer PEFT fails here, not in somebody's logits."""
    read = {
        "r lora_alpha use_rslora lora_dropout rank_pattern alpha_pattern bias init_lora_weights target_modules",
        "exclude_modules layers_to_transform layers_pattern modules_to_save ensure_weight_tying peft_type peft_version",
    }
    kept = {
        "task_type auto_mapping base_model_name_or_path revision inference_mode fan_in_fan_out megatron_core",
        "loftq_config eva_config corda_config lora_ga_config",  # how a start was found; init_lora_weights says which
        "qalora_group_size runtime_config",  # of use_qalora; never saved
    }
    known = {name for group in (*read, *kept) for name in group.split()} | set(hf.LORA_VARIANTS)
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} == known
