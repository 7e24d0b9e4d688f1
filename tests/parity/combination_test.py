"""Combinations of LoRA adapters against Hugging Face PEFT's add_weighted_adapter, and conversions against its own."""

import copy
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax import cli, combination, models, weights
from peftax.core import adapters, sites
from peftax.weights import adapters as files

torch = pytest.importorskip("torch", reason="torch lives in the parity venv")
pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).parent.parent / "weights" / "golden"
SEVERAL = {
    "red": dict(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]),
    "blue": dict(r=4, lora_alpha=2, target_modules=["q_proj", "up_proj", "embed_tokens"]),
    "green": dict(r=4, lora_alpha=8, target_modules=["q_proj"], use_rslora=True),
}
WEIGHTS = [0.7, -0.4, 1.3]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(model of torch with the adapters, ours of the same files, sites)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    source = weights.open(GOLDEN / "base_model.safetensors")
    model = models.build(source.config, scan=True)
    params = weights.load(source, models.abstract(model))
    at = tmp_path_factory.mktemp("base")
    weights.save(params, source.config, at / "base")
    found = sites.find(model.apply, params, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    plain = AutoModelForCausalLM.from_pretrained(at / "base", dtype=torch.float32)
    configs = {n: LoraConfig(task_type="CAUSAL_LM", **s) for n, s in SEVERAL.items()}
    theirs = get_peft_model(plain, configs["red"], adapter_name="red")
    for name in ("blue", "green"):
        theirs.add_adapter(name, configs[name])
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "lora_" in name:
                value.copy_(0.3 * torch.randn_like(value))
    theirs.save_pretrained(at / "adapters")
    ours = [files.load(at / "adapters" / name, params, found)[:2] for name in SEVERAL]
    return theirs, ours, found


def their_deltas(model, name):
    found = {}
    for path, module in model.named_modules():
        if name in getattr(module, "lora_A", {}) or name in getattr(module, "lora_embedding_A", {}):
            delta = module.get_delta_weight(name).detach().numpy()
            embed = name in module.lora_embedding_A
            found[path.removeprefix("base_model.model.")] = delta if embed else delta.T
    return found


def deltas(method, part, found):
    return {n: x["scale"] * (x["a"] @ x["b"]) for n, x in adapters.layers(method, part, found).items()}


def close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        worst = np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()
        assert worst <= tolerance, (name, worst)


KINDS = [k for k in combination.KINDS if not k.startswith("dare")]


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_adapters(base, kind):
    theirs, ours, found = base
    pruned = kind not in ("linear", "cat", "svd")
    votes = ("total", "frequency") if "ties" in kind else ("total",)
    for majority in votes:
        name = f"{kind}_{majority}"
        more = {"density": 0.3, "majority_sign_method": majority} if pruned else {}
        theirs.add_weighted_adapter(list(SEVERAL), WEIGHTS, name, combination_type=kind, **more)
        made = combination.combine(ours, WEIGHTS, found, kind=kind, density=0.3 if pruned else None, majority=majority)
        close(deltas(made.method, made.part, found), their_deltas(theirs, name), 2e-5)
        theirs.delete_adapter(name)


def test_another_rank(base):
    theirs, ours, found = base
    theirs.add_weighted_adapter(["red", "green"], [1.0, 0.5], "three", combination_type="svd", svd_rank=3)
    made = combination.combine([ours[0], ours[2]], [1.0, 0.5], found, kind="svd", rank=3)
    close(deltas(made.method, made.part, found), their_deltas(theirs, "three"), 2e-5)
    theirs.delete_adapter("three")


@pytest.mark.parametrize("kind", [k for k in combination.KINDS if k.startswith("dare")])
def test_dare_is_the_same_where_nothing_is_dropped(base, kind):
    theirs, ours, found = base
    theirs.add_weighted_adapter(list(SEVERAL), WEIGHTS, "dare", combination_type=kind, density=1.0)
    made = combination.combine(ours, WEIGHTS, found, kind=kind, density=1.0)
    close(deltas(made.method, made.part, found), their_deltas(theirs, "dare"), 2e-5)
    theirs.delete_adapter("dare")


def test_several_merged_into_the_base(base, tmp_path):
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    theirs, _, _ = base
    at = Path(theirs.config.name_or_path)
    adapters = [str(at.parent / "adapters" / name) for name in SEVERAL]
    assert cli.main(["merge", f"--base={at}", "--adapter", *adapters, f"--into={tmp_path / 'ours'}"]) == 0
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).state_dict()
    merged = copy.deepcopy(theirs).merge_and_unload(adapter_names=list(SEVERAL)).state_dict()
    plain = load_file(at / "model.safetensors")
    changed = {name for name in plain if np.abs(merged[name].numpy() - plain[name]).max() > 0.1}
    assert len(changed) == 1 + 2 * 3
    for name, value in merged.items():
        np.testing.assert_allclose(ours[name], value, atol=2e-6 * value.abs().max(), err_msg=name)


@pytest.mark.parametrize("rank", [5, 0.8])
def test_conversion(rank, tmp_path):
    from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    source = weights.open(GOLDEN / "base_model.safetensors")
    model = models.build(source.config, scan=True)
    params = weights.load(source, models.abstract(model))
    weights.save(params, source.config, tmp_path / "base")
    found = sites.find(model.apply, params, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    fresh = functools.partial(AutoModelForCausalLM.from_pretrained, tmp_path / "base", dtype=torch.float32)
    config, state = convert_to_lora(PeftModel.from_pretrained(fresh(), GOLDEN / "LOHA"), rank=rank)
    theirs = get_peft_model(fresh(), config)

    set_peft_model_state_dict(theirs, state)
    method, part, _ = files.load(GOLDEN / "LOHA", params, found)
    made = combination.convert(method, part, found, rank)
    close(deltas(made.method, made.part, found), their_deltas(theirs, "default"), 2e-5)
    files.save(tmp_path / "lora", made.part, made.method, found)
    again = PeftModel.from_pretrained(fresh(), tmp_path / "lora")
    close(their_deltas(again, "default"), their_deltas(theirs, "default"), 2e-5)
