"""What finished runs are read on: their losses are those that evaluate.nll gives, each row counts once."""

import json

import jax
import pytest

from peftax.data import prose
from peftax.train import evaluate, loop, readings, setup
from tests.train import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config with a test, adapter) of a run."""
    into = tmp_path_factory.mktemp("run")
    base, data = tiny_run.base_folder(into / "base"), tiny_run.data_file(into / "data.jsonl")
    test = tiny_run.data_file(into / "test.jsonl", rows=40)
    config = tiny_run.config(base, data, train__steps="3", data__test=str(test), data__test_limit="9")
    patch = pytest.MonkeyPatch()
    devices = jax.devices()[:1]
    patch.setattr("peftax.sharding.jax.devices", lambda: devices)
    loop.train(config, into / "run")
    yield config, into / "run" / "adapter"
    patch.undo()


def test_test_and_other_data(run, tmp_path):
    config, adapter = run
    reader = readings.Reader(config)
    found = reader.test(adapter)
    assert found["nll"] < reader.measure(config["data"]["test"])["nll"]  # it has learnt something
    rows = setup.held_out(reader.base, config["data"], "test")
    one = setup.attach(reader.base, adapter)
    whole = evaluate.nll(one.apply, one.params, rows)
    assert found == {k: pytest.approx(whole[k], rel=1e-5) for k in ("nll", "tokens")}
    assert len(whole["per_row"]["nll"]) == 9

    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("add 1 and 2", " ", "three and four", "5 and 6")))
    both = reader.measure(str(texts), adapter), reader.measure(str(texts))
    assert both[0]["tokens"] == both[1]["tokens"] and both[0]["nll"] != both[1]["nll"]
    assert reader.measure(f"{texts}#train[:1]", adapter)["tokens"] < both[0]["tokens"]
    with pytest.raises(FileNotFoundError, match="no data file"):
        reader.measure(str(tmp_path / "gone.jsonl"), adapter)


def test_methods_that_peft_does_not_know_are_told_apart(run, tmp_path):
    config, _ = run
    adapters = []
    for method in ({"name": "full", "targets": ".*k_proj"}, {"name": "adapter", "size": 4}):
        loop.train({**config, "method": method}, tmp_path / method["name"])
        adapters.append(tmp_path / method["name"] / "adapter")
    reader = readings.Reader(config)
    one_by_one = [readings.Reader(config).test(adapter)["nll"] for adapter in adapters]
    assert [reader.test(adapter)["nll"] for adapter in adapters] == pytest.approx(one_by_one, rel=1e-6)
    assert len(reader._applies) == 2


def test_a_task_is_a_file_that_has_examples(run, monkeypatch):
    assert readings.is_task("prose") and readings.is_task("function_calling")
    assert not any(map(readings.is_task, ("packing", "imdb", "some/hub_name", "file.jsonl")))
    monkeypatch.setattr(prose, "examples", lambda split: [{"prompt": "", "completion": f"add {split} and 7"}] * 2)
    config, adapter = run
    assert readings.Reader(config).measure("prose", adapter)["tokens"] > 2
