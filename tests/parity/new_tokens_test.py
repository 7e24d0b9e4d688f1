"""New tokens, as users of Hugging Face train them: both directions."""

import json
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from peftax.train import setup
from peftax.weights import adapters
from tests.train import tiny_run

torch = pytest.importorskip("torch", reason="torch lives in the parity venv")
pytestmark = pytest.mark.parity

NEW = ("<call>", "<end>")
MESH = {"fsdp": 1, "data": 1}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr("peftax.sharding.jax.devices", lambda: devices)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    base = tiny_run.base_folder(tmp_path_factory.mktemp("b") / "base")
    if request.param:
        return base
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 0.1)
    into = tmp_path_factory.mktemp("u") / "untied"
    model.save_pretrained(into)
    for file in base.glob("tokenizer*"):
        (into / file.name).write_bytes(file.read_bytes())
    return into


def resized(folder, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    return model


def torch_logits(model, ids):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids).long()).logits.numpy()


def all_new(base):
    n = base.config["vocab_size"]
    return np.random.default_rng(0).integers(0, n, (2, 9)).astype(np.int32), n


def settings(base, name):
    """Rows of both sides where there are two."""
    tables = ("embed_tokens",) if base.config["tie_word_embeddings"] else ("embed_tokens", "lm_head")
    if name == "lora":
        return {
            "name": name,
            "targets": ["q_proj"],
            "rank": 2,
            "tokens": dict.fromkeys(tables, NEW),
            "adapter": "default",
        }
    return {"name": name, "targets": tables, "tokens": NEW, "adapter": "default"}


@pytest.mark.parametrize("name", ["lora", "trainable_tokens"])
def test_peft_loads_what_we_write(folder, name, tmp_path):
    from peft import PeftModel
    from transformers import AutoTokenizer

    base = setup.open_base(path=str(folder), mesh=MESH, new_tokens=NEW)
    run = setup.start(base, settings(base, name), seed=0)
    noise = np.random.default_rng(1)
    moved = jax.tree.map(lambda x: x + 0.3 * noise.standard_normal(x.shape).astype("f"), run.part.trainable)
    run.part = run.part._replace(trainable=moved)
    run.save(tmp_path / "a", base=str(folder))
    ids, _ = all_new(base)
    ids[0, 2:4] = base.tokenizer.convert_tokens_to_ids(list(NEW))
    ours = np.asarray(run.apply({"params": run.params}, ids))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.encode("<end>", add_special_tokens=False) == [base.config["vocab_size"] - 1]
    model = resized(folder, tokenizer)
    plain = torch_logits(model, ids)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = torch_logits(PeftModel.from_pretrained(model, tmp_path / "a"), ids)
    effect = np.abs(ours - plain).max()
    assert effect > 0.1
    assert np.abs(ours - theirs).max() <= 1e-5 + 1e-3 * effect


@pytest.mark.parametrize("name", ["lora", "lora_without_tokens", "trainable_tokens"])
def test_we_load_what_peft_writes(folder, name, tmp_path):
    """PEFT writes whole tables where the vocabulary was resized."""
    from peft import LoraConfig, TrainableTokensConfig, get_peft_model
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(NEW))
    model = resized(folder, tokenizer)
    ids = tokenizer.convert_tokens_to_ids(list(NEW))
    if name == "trainable_tokens":
        config = TrainableTokensConfig(token_indices=ids, task_type="CAUSAL_LM")
    else:
        tokens = ids if name == "lora" else None
        config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens, task_type="CAUSAL_LM")
    theirs = get_peft_model(model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if "lora_" in key or "trainable_tokens" in key:
                value += 0.3 * torch.randn_like(value)
    theirs.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    whole = [k for k in load_file(tmp_path / "a" / adapters.TENSORS) if k.endswith(("base_layer.weight", "s.weight"))]
    assert whole, json.loads((tmp_path / "a" / adapters.PEFT_CONFIG).read_text())
    base = setup.open_base(path=str(folder), mesh=MESH, adapter=tmp_path / "a")
    run = setup.attach(base, tmp_path / "a")
    batch, _ = all_new(base)
    batch[0, 2:4] = ids
    expect = torch_logits(theirs, batch)
    ours = np.asarray(run.apply({"params": run.params}, batch))
    plain = np.asarray(base.model.apply({"params": base.params}, batch))
    effect = np.abs(expect - plain).max()
    assert effect > 0.05
    assert np.abs(ours - expect).max() <= 1e-5 + 1e-3 * effect
