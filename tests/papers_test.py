"""Each recipe of configs/papers trains two steps on rows of its data's columns, on a tiny model of its type."""

import json

import jax
import pytest

from peftax import recipe
from peftax.data import chat
from peftax.train import loop, setup
from tests.data import tiny
from tests.train import tiny_run

NAMES = [name for name in recipe.shipped() if name.startswith("papers/")]
ROWS = {  # by the data that a recipe names
    "timdettmers/openassistant-guanaco": {"text": "### Human: what is the weather?### Assistant: the answer is 42"},
    "commonsense_170k.json": {
        "instruction": "is it 42?",
        "input": "",
        "output": "the answer is true",
        "answer": "true",
    },
    "meta-math/MetaMathQA": {"query": "what is 6 x 7?", "response": "the answer is 42", "type": "GSM_Rephrased"},
    "openai/gsm8k": {"question": "what is 6 x 7?", "answer": "6 x 7 = 42 #### 42"},
    "allenai/tulu-3-sft-mixture": {
        "id": "a",
        "source": "b",
        "messages": [{"role": r, "content": c} for r, c in (("user", "6 x 7?"), ("assistant", "the answer is 42"))],
    },
    "ise-uiuc/Magicoder-Evol-Instruct-110K": {"instruction": "add 6 and 7", "response": "6 + 7"},
}
SMALL = {
    "data.length": "256",
    "model.dtype": "float32",
    "model.param_dtype": "float32",
    "model.remat": "none",
    "method.rank": "2",
    "train.steps": "2",
    "train.batch_size": "2",
    "train.accumulate": "1",
    "train.eval_every": "2",
    "train.save_every": "2",
    "train.tensorboard": "False",
    "mesh.fsdp": "1",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Wide enough for groups of 64, and without a chat template, as base models are."""
    tokenizer = tiny.tokenizer(template=None)
    more = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}
    return tiny_run.base_folder(tmp_path_factory.mktemp("base"), tokenizer=tokenizer, **more)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs here use the first of the fake devices."""
    devices = jax.devices()[:1]
    monkeypatch.setattr("peftax.sharding.jax.devices", lambda: devices)


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name, base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    config = recipe.load(name)
    rows.write_text("".join(json.dumps(ROWS[config.data.train]) + "\n" for _ in range(4)))
    here = {"model.path": str(base), "data.train": str(rows), "data.train_split": "train", "data.name": "None"}
    done = loop.train(recipe.load(name, [*here.items(), *SMALL.items()]).to_dict(), tmp_path / "run")
    assert done["step"] == 2
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in metrics if "loss" in m]
    assert len(losses) == 2 and all(1 < loss < 20 for loss in losses)


def test_every_data_set_has_rows_and_every_variant_is_another_config():
    assert {recipe.load(name).data.train for name in NAMES} == set(ROWS)
    for name in NAMES:
        made = [recipe.load(f"{name}:{v}").to_json() for v in recipe.variants(name)]
        assert len(set(made)) == len(made)
        assert not made or made[0] == recipe.load(name).to_json()


def test_what_is_learned():
    """Guanaco learns the whole text, PiSSA the response alone, LoRA Without Regret what the assistant says."""
    tokenizer = tiny.tokenizer(template=None)

    def learned(name):
        data = recipe.load(name).data
        row = ROWS[data.train]
        if data.prompt is not None:
            (row,) = setup.data_source.templated([row], data.prompt, data.completion)
        tokenizer.chat_template = data.chat_template
        example = chat.encode(row, tokenizer)
        return tokenizer.decode([i for i, w in zip(example.tokens, example.weights, strict=True) if w])

    text = "### Human: what is the weather?### Assistant: the answer is 42</s>"
    assert learned("papers/guanaco_7b") == text
    assert learned("papers/pissa_llama2_7b_metamath") == "the answer is 42\n</s>"
    assert learned("papers/lwr_llama3_8b_tulu3").strip() == "the answer is 42<|end_of_text|>"
    assert learned("papers/dora_llama_7b_commonsense").endswith("### Response:\nthe answer is true</s>")
