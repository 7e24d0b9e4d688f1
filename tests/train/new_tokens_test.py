"""Tokens that the tokenizer has to learn, through the real loop: grown tables, trained rows, files, and back."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peftax import cli
from peftax.data import packing
from peftax.train import evaluate, loop, setup
from peftax.weights import adapters
from tests.train import tiny_run

NEW = ("<call>", "<end>")
DELTA = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.fixture(autouse=True, scope="module")
def one_device():
    patch = pytest.MonkeyPatch()
    devices = jax.devices()[:1]
    patch.setattr("peftax.sharding.jax.devices", lambda: devices)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    rows = [
        {"messages": [{"role": "user", "content": f"add {i}"}, {"role": "assistant", "content": f"<call>{i}<end>"}]}
        for i in range(16)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tiny_run.base_folder(folder / "base"), folder / "data.jsonl"


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    config = tiny_run.config(*files, model__new_tokens=str(NEW), method__tokens=str(NEW), method__targets="('q_proj',)")
    workdir = tmp_path_factory.mktemp("run")
    return workdir, loop.train(config, workdir), config


def nll(base, apply, params, data):
    rows = packing.pack(setup.examples(base, "valid", length=64, policy="drop", task=None, source=str(data)), 64)
    return evaluate.nll(apply, params, rows)["nll"]


def test_rows_train_and_the_adapter_alone_brings_them_back(files, trained):
    workdir, result, _ = trained
    old = json.loads((files[0] / "config.json").read_text())["vocab_size"]
    losses = [m["loss"] for m in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()) if "loss" in m]
    assert losses[-1] < 0.9 * losses[0]

    tensors = load_file(workdir / "adapter" / adapters.TENSORS)
    raw = json.loads((workdir / "adapter" / adapters.PEFT_CONFIG).read_text())
    assert raw["trainable_token_indices"] == [old, old + 1]
    assert tensors[DELTA].shape == (2, 32) and not [k for k in tensors if "base_layer" in k]
    began = load_file(files[0] / "model.safetensors")["model.embed_tokens.weight"].mean(0)
    moved = np.abs(tensors[DELTA] - began).max(1)
    assert (moved > 0.01).all() and np.abs(tensors[DELTA][0] - tensors[DELTA][1]).max() > 0.01

    base = setup.open_base(path=str(files[0]), mesh={"fsdp": 1, "data": 1}, adapter=workdir / "adapter")
    assert base.tokenizer.encode("<end>", add_special_tokens=False) == [old + 1]
    run = setup.attach(base, workdir / "adapter")
    assert nll(base, run.apply, run.params, files[1]) == pytest.approx(result["best"][1], rel=1e-6)


def test_a_run_goes_on(trained, tmp_path):
    workdir, result, config = trained
    assert loop.train(config, workdir)["best"] == result["best"]


def test_merged_it_is_a_larger_model(files, trained, tmp_path):
    workdir, result, _ = trained
    merge = ["merge", "--base", str(files[0]), "--adapter", str(workdir / "adapter"), "--into", str(tmp_path / "m")]
    assert cli.main(merge) == 0
    base = setup.open_base(path=str(tmp_path / "m"), mesh={"fsdp": 1, "data": 1})
    assert base.config["vocab_size"] == len(base.tokenizer) and base.config["tie_word_embeddings"]
    apply = base.model.apply
    assert nll(base, apply, base.params, files[1]) == pytest.approx(result["best"][1], rel=1e-5)


def test_rows_that_no_adapter_holds_are_written_whole(files, tmp_path, monkeypatch):
    """As PEFT does where the vocabulary was resized; read back onto a table of another start."""
    config = tiny_run.config(
        *files, model__new_tokens=str(NEW), model__new_rows="normal", method__targets="('q_proj',)"
    )
    base = setup.open_base(**config["model"], mesh=config["mesh"])
    said = []
    monkeypatch.setattr("absl.logging.warning", said.append)
    run = setup.start(base, config["method"], seed=0)
    assert "nothing trains their rows" in said[0]
    run.save(tmp_path / "a")
    table = run.params["model"]["embed_tokens"]["embedding"]
    key = "base_model.model.model.embed_tokens.weight"
    np.testing.assert_array_equal(load_file(tmp_path / "a" / adapters.TENSORS)[key], table)
    again = setup.open_base(path=str(files[0]), mesh=config["mesh"], adapter=tmp_path / "a")
    assert (again.params["model"]["embed_tokens"]["embedding"][-2:] != table[-2:]).any()
    attached = setup.attach(again, tmp_path / "a")
    np.testing.assert_array_equal(attached.params["model"]["embed_tokens"]["embedding"], table)
    plain = setup.open_base(path=str(files[0]), mesh=config["mesh"])
    with pytest.raises(ValueError, match="embed_tokens.weight.*was its vocabulary resized.*new_tokens"):
        setup.attach(plain, tmp_path / "a")


def test_combined_and_converted_they_keep_tokenizer_and_table(files, tmp_path, capsys):
    base = setup.open_base(path=str(files[0]), new_tokens=NEW, mesh={"fsdp": 1, "data": 1})
    for seed, name in enumerate("ab"):
        run = setup.start(base, {"name": "lora", "rank": 2, "targets": ("q_proj",), "adapter": "default"}, seed=seed)
        run.part = run.part._replace(trainable=jax.tree.map(lambda x: x + 0.1, run.part.trainable))
        run.save(tmp_path / name)
    a, b, both, fewer = (str(tmp_path / name) for name in ("a", "b", "both", "fewer"))
    combine = ["combine", "--base", str(files[0]), "--kind=cat", "--adapters", a, b, "--into"]
    assert cli.main([*combine, both]) == 0
    assert cli.main(["convert", "--base", str(files[0]), "--adapter", a, "--to-lora=1", "--into", fewer]) == 0
    key = "base_model.model.model.embed_tokens.weight"
    for folder in (both, fewer):
        again = setup.open_base(path=str(files[0]), mesh={"fsdp": 1, "data": 1}, adapter=folder)
        assert again.tokenizer.encode("<end>", add_special_tokens=False) == [len(base.tokenizer) - 1]
        setup.attach(again, folder)
        np.testing.assert_array_equal(*(load_file(f"{f}/{adapters.TENSORS}")[key] for f in (folder, a)))
    tensors = load_file(f"{b}/{adapters.TENSORS}")
    save_file({**tensors, key: tensors[key] + 1}, f"{b}/{adapters.TENSORS}")
    capsys.readouterr()
    assert cli.main([*combine, str(tmp_path / "no")]) == 1
    assert "b: brings 'model/embed_tokens/embedding', not this base's" in capsys.readouterr().err


def test_tokens_are_known_or_named(files):
    base = setup.outline(path=str(files[0]), new_tokens=NEW, mesh={"fsdp": 1, "data": 1})
    made = setup.make_method(base, {"name": "trainable_tokens", "tokens": ("<end>", 3)})
    assert made.config["tokens"] == (base.config["vocab_size"] - 1, 3)
    with pytest.raises(ValueError, match="'<ende>' is no token of .*new_tokens adds it; the nearest: '<end>'"):
        setup.make_method(base, {"name": "lora", "tokens": {"embed_tokens": ("<ende>",)}})
    with pytest.raises(ValueError, match="new_rows 'zeros' is none of 'mean', 'normal'"):
        setup.outline(path=str(files[0]), new_tokens=NEW, new_rows="zeros")
