"""Classifiers from end to end: a head beside any method learns, is in the folder, and comes back from it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax import models, weights
from peftax.core import tree
from peftax.data import packing
from peftax.train import evaluate, loop, readings, setup
from tests.data import tiny
from tests.models.bert_test import TINY
from tests.train import tiny_run

LABELS = ("no", "yes")
METHODS = {
    "lora": {"method.targets": "('query', 'value')"},
    "adapter": {"method.size": "4"},
    "bitfit": {},
    "ia3": {"method.targets": "('key', 'value', 'output.dense')", "method.feedforward": "('output.dense',)"},
    "prefix": {"method.length": "3"},
    "prefix+adapter": {"method.adapter.size": "4"},
    "full": {},
}
OURS = ("adapter", "bitfit", "prefix+adapter", "full")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr("peftax.sharding.jax.devices", lambda: devices)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    at = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"text": f"{'Paris' if i % 2 else 'course'} is {i % 7}", "label": LABELS[i % 2]} for i in range(40)]
    at.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return at


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A bare encoder with its pooler, and no head."""
    config = {**TINY, "vocab_size": len(tiny.tokenizer())}
    params = models.build(config, labels=2).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    weights.save(
        {"bert": params["bert"]}, config, at := tmp_path_factory.mktemp("b") / "base", tokenizer=tiny.tokenizer()
    )
    return at


def config(base, data, **overrides):
    given = {"model.labels": repr(LABELS), "optimizer.learning_rate": "0.03", "train.steps": "12", **overrides}
    given |= {"train.eval_every": "6", "train.save_every": "12", "train.batch_size": "4", "data.length": "16"}
    return tiny_run.config(base, data, **{k.replace(".", "__"): v for k, v in given.items()})


def look(run, c):
    rows = packing.pack(setup.examples(run.base, "valid", source=c["data"]["valid"], **ALL), 16)
    return evaluate.nll(run.apply, run.params, rows, hits=True)


ALL = {"length": 16, "policy": "error", "task": None}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_a_head(encoder, data, tmp_path, method):
    c = config(encoder, data, **{"method.name": method, **METHODS[method]})
    done = loop.train(c, tmp_path / "run")
    looks = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    looks = [x for x in looks if "valid_nll" in x]
    np.testing.assert_allclose(looks[0]["valid_nll"], np.log(2), rtol=1e-5)  # a head of zeros
    assert looks[-1]["valid_nll"] < 0.5 and looks[-1]["valid_accuracy"] > 0.9, looks
    folder = tmp_path / "run" / "adapter"
    run = setup.attach(setup.open_base(path=str(encoder), adapter=folder), folder)
    assert run.base.labels == LABELS
    found = look(run, c)
    np.testing.assert_allclose([done["best"][1]], [found["nll"]], rtol=1e-5)
    kernel = tree.flatten(run.part.trainable)["classifier/kernel"]
    assert np.abs(np.asarray(kernel)).max() > 0
    if method not in OURS:
        said = json.loads((folder / "adapter_config.json").read_text())
        assert said["task_type"] == "SEQ_CLS" and said["modules_to_save"] == ["classifier"]
    if method == "lora":
        told = (("Paris is 1", "yes"), ("course is 2", "no"), ("Paris is 3", "no"))  # the last one is not so
        test = tmp_path / "test.jsonl"
        test.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in told))
        c["data"]["test"] = str(test)
        read = readings.Reader(c).test(folder)
        assert read["tokens"] == 3 and read["accuracy"] == pytest.approx(2 / 3)
        folded = weights.save(run.method.fold(run.params, run.base.sites), run.base.config, tmp_path / "folded")
        assert json.loads((folded / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
        again = setup.open_base(path=str(folded))
        assert again.labels == LABELS


def test_texts_beyond_an_encoders_positions(encoder, data):
    """As the policy says, whatever the rows' length: packed texts have positions of their own."""
    base = setup.outline(path=str(encoder), labels=LABELS)
    base.config["max_position_embeddings"] = 3
    given = {**ALL, "source": str(data)}
    with pytest.raises(ValueError, match="above the context of 3"):
        setup.examples(base, "train", **given)
    assert max(len(e.tokens) for e in setup.examples(base, "train", **{**given, "policy": "truncate"})) == 3


def test_prompts_before_what_looks_both_ways(encoder):
    base = setup.outline(path=str(encoder), labels=LABELS)
    with pytest.raises(ValueError, match="'prompt': bert looks both ways.*the nearest is prefix"):
        setup.make_method(base, {"name": "prompt", "length": 3, "table": "word_embeddings"})


def test_a_decoder_tells_labels_apart_too(data, tmp_path):
    base = tiny_run.base_folder(tmp_path / "base", tie_word_embeddings=False)
    c = config(base, data, **{"model.pooling": "mean"})  # "last" is held against transformers'
    done = loop.train(c, tmp_path / "run")
    assert done["valid"] < 0.5
    folder = tmp_path / "run" / "adapter"
    run = setup.attach(setup.open_base(path=str(base), adapter=folder), folder)
    assert run.base.model.config.pooling == "mean"
    np.testing.assert_allclose(look(run, c)["nll"], done["best"][1], rtol=1e-5)
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["score"]


def test_labels_are_checked_at_the_door(encoder):
    for labels in (1, ("a", "a")):
        with pytest.raises(ValueError, match="want a number above 1, or names that differ"):
            setup.open_base(path=str(encoder), labels=labels)
    assert setup.open_base(path=str(encoder), labels=3).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
