"""What we write, Hugging Face PEFT and transformers open, with equal logits."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax import models, weights
from peftax.core import injection, sites, tree
from peftax.core.method import Ctx
from peftax.weights import adapters

torch = pytest.importorskip("torch", reason="torch lives in the parity venv")
pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).parent.parent / "weights" / "golden"
REFUSED = ("LILY",)
CASES = sorted(p.parent.name for p in GOLDEN.glob("*/adapter_config.json") if p.parent.name not in REFUSED)
TASKS = {c["case"]: c.get("task_ids") for c in json.loads((GOLDEN / "cases.json").read_text())["cases"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder of the base, model, params, sites)."""
    source = weights.open(GOLDEN / "base_model.safetensors")
    model = models.build(source.config, scan=True)
    shapes = models.abstract(model)
    params = weights.load(source, shapes)
    folder = weights.save(params, source.config, tmp_path_factory.mktemp("b") / "base")
    found = sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    return folder, model, params, found


def torch_logits(model, ids: np.ndarray, **more) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids).long(), **more).logits.numpy()[:, -ids.shape[1] :]  # without a prompt's own


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_write(base, case, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, model, params, found = base
    ids = np.load(GOLDEN / "input_ids.npy").astype(np.int32)
    method, part, raw = adapters.load(GOLDEN / case, params, found)
    # other values than the file's, so that nothing can pass by having been read from it
    noise = np.random.default_rng(0)
    part = part._replace(
        trainable=jax.tree.map(lambda x: x + 0.05 * noise.standard_normal(x.shape).astype("f"), part.trainable)
    )
    part = part._replace(trainable=_real(part.trainable, method, found))
    adapters.save(tmp_path / "a", part, method, found, base=str(folder), extra=raw)
    tasks = TASKS.get(case)
    ctx, more = (Ctx(), {}) if tasks is None else (Ctx(tasks=jnp.array(tasks)), {"task_ids": torch.tensor(tasks)})
    ours = np.asarray(injection.inject(model.apply, method)({"params": tree.merge(*part)}, ids, ctx=ctx))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    effect = np.abs(ours - torch_logits(plain, ids)).max()
    theirs = torch_logits(PeftModel.from_pretrained(plain, tmp_path / "a").eval(), ids, **more)
    assert effect > 5e-3
    assert np.abs(ours - theirs).max() <= 1e-5 + 1e-3 * effect

    if method.fold is not None and case != "LORA_bias_all":
        tied = weights.save(method.fold(tree.merge(*part), found), _config(folder), tmp_path / "folded")
        folded = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
        assert np.abs(ours - torch_logits(folded, ids)).max() <= 1e-5 + 1e-3 * effect


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_we_load_what_peft_writes_on_a_moved_base(base, start, tmp_path):
    """Its folder holds A and B alone: whoever reads it moves the base as it was moved."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder, model, params, found = base
    ids = np.load(GOLDEN / "input_ids.npy").astype(np.int32)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=start, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(plain, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "lora_" in name:
                value += 0.05 * torch.randn_like(value)
    theirs.save_pretrained(tmp_path / "a")
    expect = torch_logits(theirs.eval(), ids)
    method, part, _ = adapters.load(tmp_path / "a", params, found)
    assert method.config["init"] == start
    ours = np.asarray(injection.inject(model.apply, method)({"params": tree.merge(*part)}, ids))
    effect = np.abs(expect - np.asarray(model.apply({"params": params}, ids))).max()
    assert effect > 0.02
    assert np.abs(ours - expect).max() <= 1e-5 + 1e-3 * effect

    adapters.save(tmp_path / "b", part, method, found, base=str(folder))  # of the untouched base
    from peft import PeftModel

    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again = torch_logits(PeftModel.from_pretrained(fresh, tmp_path / "b").eval(), ids)
    assert np.abs(again - expect).max() <= 1e-5 + 1e-3 * effect


def _config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def _real(trainable, method, found):
    """Zero what pads a stack of unlike ranks; noise must not fill it."""
    flat = tree.flatten(trainable)
    for path, leaf in flat.items():
        bits = path.split("/")
        if len(bits) < 4 or bits[-3] != "lora":
            continue
        site, piece, axes = sites.theta_of(path, method, found)
        keep = np.zeros(leaf.shape, np.float32)
        for layer, name in enumerate(site.names):
            settings = piece.settings(name, site.kind)
            if settings is not None:
                shape = sites.real_shape(settings, axes, leaf.shape[len(site.stack) :])
                keep[(*((layer,) if site.stack else ()), *(slice(n) for n in shape))] = 1
        flat[path] = leaf * keep
    return tree.unflatten(flat)
