"""The contenders of experiments/speed have the same losses on a tiny model, and their table says what was timed."""

import argparse
import importlib.util
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: run with .venv-parity")

import transformers  # noqa: E402

from experiments.speed import __main__ as speed  # noqa: E402
from experiments.speed import hf_peft_side, inputs, peftax_side  # noqa: E402
from peftax.train import setup  # noqa: E402
from peftax.weights import adapters  # noqa: E402

pytestmark = pytest.mark.parity
STEPS, ROWS, LENGTH, VOCAB = 20, 2, 8, 61


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("speed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(at / "base")
    base = setup.open_base(path=str(at / "base"))
    run = setup.start(base, inputs.METHOD, seed=0)
    adapters.save(at / "adapter", run.part, run.method, base.sites)
    return at


@pytest.mark.parametrize("dtype", ["float32", "nf4"])
def test_losses_agree(folder, dtype):
    """20 steps; in nf4 from weights that each library packs itself, to the same bytes."""
    told = {"base": str(folder / "base"), "rate": inputs.RATE}
    args = argparse.Namespace(
        inputs=folder,
        dtype=dtype,
        scan=1,
        remat="dots",
        chunk=128,
        kind="sdpa",
        autocast=0,
        threads=1,
        adapter="adapter",
    )
    loads = {"peftax": peftax_side.load, "HF PEFT": hf_peft_side.load}
    if importlib.util.find_spec("qwix") and dtype == "float32":
        from experiments.speed import qwix_side

        loads["qwix"] = qwix_side.load
    batches = np.random.default_rng(0).integers(0, VOCAB, (STEPS, ROWS, LENGTH + 1), np.int32)
    losses = {}
    for name, load in loads.items():
        step = load(args, told)
        losses[name] = [step(batch) for batch in batches]
    assert losses["peftax"][-1] != losses["peftax"][0]
    for name, found in losses.items():
        np.testing.assert_allclose(found, losses["peftax"], rtol=speed.TOLERANCE[dtype], err_msg=name)


def test_report():
    memory = {"peak": 2.0, "peak_later": 1.5}
    figures = {
        name: {"load": 1.0, "seconds": [9.0, 9.0, *[seconds] * 10], "losses": [2.0] * 12, "memory": memory}
        for name, seconds in ((speed.OURS, 2.0), ("HF PEFT, eager", 5.0), ("HF PEFT, SDPA", 3.0))
    }
    summary = speed.summarize(figures)
    assert summary["best_hf"] == "HF PEFT, SDPA"
    assert summary["contenders"]["HF PEFT, SDPA"]["ratio"] == 1.5
    assert summary["contenders"]["HF PEFT, SDPA"]["pairs"] == 10
    results = {"machine": speed.machine(1), "dtypes": {"float32": {"contenders": figures, "summary": summary}}}
    speed.check(results)
    json.dumps(results)
    assert "**1.50×**" in speed.report(results)
    figures["HF PEFT, SDPA"]["losses"][-1] = 2.1
    results["dtypes"]["float32"]["summary"] = speed.summarize(figures)
    with pytest.raises(SystemExit, match="HF PEFT, SDPA"):
        speed.check(results)
