"""Adapters of classifiers: PEFT opens ours on transformers' classes, we open PEFT's, with equal logits."""

import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: run with .venv-parity")

import peft  # noqa: E402
import transformers  # noqa: E402

from peftax.train import setup  # noqa: E402

pytestmark = pytest.mark.parity
torch.set_num_threads(1)

SIZES = dict(vocab_size=61, hidden_size=24, intermediate_size=41, num_hidden_layers=2, num_attention_heads=4)
KINDS = {
    "bert": (transformers.BertConfig, {}, ["query", "value"], ["key", "value", "output.dense"], ["output.dense"]),
    "llama": (
        transformers.LlamaConfig,
        {"num_key_value_heads": 2},
        ["q_proj", "v_proj"],
        ["k_proj", "v_proj", "down_proj"],
        ["down_proj"],
    ),
}
IDS = np.random.default_rng(0).integers(1, 61, (3, 9)).astype(np.int32)
HELD = (np.arange(9)[None] < np.array([9, 4, 7])[:, None]).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    @functools.cache
    def make(kind):
        config, more, *_ = KINDS[kind]
        torch.manual_seed(0)
        config = config(**SIZES, **more, num_labels=3, pad_token_id=0, attn_implementation="eager")
        model = transformers.AutoModelForSequenceClassification.from_config(config).to(torch.float32)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        model.save_pretrained(at := tmp_path_factory.mktemp(kind))
        return at

    return make


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr("peftax.sharding.jax.devices", lambda: devices)


def reference(at):
    return transformers.AutoModelForSequenceClassification.from_pretrained(at, attn_implementation="eager").eval()


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(IDS * HELD).long(), attention_mask=torch.tensor(HELD)).logits.numpy()


def ours(run):
    return np.asarray(run.apply({"params": run.params}, IDS * HELD, None, HELD))[:, 0]


def settings(kind, method):
    *_, lora, ia3, feedforward = KINDS[kind]
    return {
        "lora": {"name": "lora", "rank": 4, "targets": lora},
        "ia3": {"name": "ia3", "targets": ia3, "feedforward": feedforward},
        "prefix": {"name": "prefix", "length": 3},
    }[method]


def config(kind, method):
    own = settings(kind, method)
    if method == "lora":
        return peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=own["targets"])
    if method == "ia3":
        return peft.IA3Config(
            task_type="SEQ_CLS", target_modules=own["targets"], feedforward_modules=own["feedforward"]
        )
    return peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)


def moved(x):
    return x + 0.1 * np.random.default_rng(x.size).standard_normal(x.shape).astype(np.float32)


def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("method", ["lora", "ia3", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_ours(folder, tmp_path, kind, method):
    at = folder(kind)
    base = setup.open_base(path=str(at))
    run = setup.start(base, settings(kind, method), seed=0)
    run.part = run.part._replace(trainable=jax.tree.map(moved, run.part.trainable))
    run.save(tmp_path / "a", base=str(at))
    expected = ours(run)
    opened = peft.PeftModel.from_pretrained(reference(at), tmp_path / "a").eval()
    close(theirs(opened), expected)
    assert np.abs(expected - theirs(reference(at))).max() > 0.05


@pytest.mark.parametrize("method", ["lora", "ia3", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_we_open_pefts(folder, tmp_path, kind, method):
    at = folder(kind)
    model = peft.get_peft_model(reference(at), config(kind, method)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path / "a")
    run = setup.attach(setup.open_base(path=str(at)), tmp_path / "a")
    close(ours(run), theirs(model))
    run.save(tmp_path / "b", base=str(at))
    close(ours(setup.attach(run.base, tmp_path / "b")), theirs(model))
