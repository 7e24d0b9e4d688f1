"""A whole run on a tiny base: what it writes, that it goes on where it stopped, what it refuses.

Killed processes stand in kill_test.py.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from peftax.train import evaluate, loop, programs, setup, step
from peftax.weights import adapters
from tests.train import tiny_run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return tiny_run.base_folder(folder / "base"), tiny_run.data_file(folder / "data.jsonl")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs here use the first of the fake devices."""
    import jax

    devices = jax.devices()[:1]
    monkeypatch.setattr("peftax.sharding.jax.devices", lambda: devices)


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """A run that nothing disturbed; on the first device."""
    import jax

    patch = pytest.MonkeyPatch()
    devices = jax.devices()[:1]
    patch.setattr("peftax.sharding.jax.devices", lambda: devices)
    workdir = tmp_path_factory.mktemp("whole")
    result = loop.train(tiny_run.config(*files, method__dropout="0.1"), workdir)
    patch.undo()
    return workdir, result


def test_a_run_learns_and_leaves_its_files(whole, files):
    workdir, result = whole
    metrics = _lines(workdir / "metrics.jsonl")
    losses = [m["loss"] for m in metrics if "loss" in m]
    valid = [m["valid_nll"] for m in metrics if "valid_nll" in m]
    assert len(losses) == 6 and len(valid) == 4
    assert valid[-1] < 0.9 * valid[0]
    assert result["step"] == 6 and result["best"][1] == min(valid)
    assert len(_lines(workdir / "timings.jsonl")) == 6
    config = json.loads((workdir / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == str(files[0])
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4", "6"]


@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_interrupted_run_ends_bit_identical(whole, files, tmp_path, monkeypatch, accumulate):
    config = tiny_run.config(*files, method__dropout="0.1")
    reference = whole[0]
    if accumulate == "2":
        config = tiny_run.config(*files, train__accumulate="2", train__batch_size="4")
        reference = tmp_path / "reference"
        loop.train(config, reference)

    real = programs.make_step
    calls = []

    def dying(*args, **kwargs):
        inner = real(*args, **kwargs)

        def step_fn(*a):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("the machine went away")
            return inner(*a)

        return step_fn

    monkeypatch.setattr(programs, "make_step", dying)
    workdir = tmp_path / "run"
    with pytest.raises(RuntimeError):
        loop.train(config, workdir)
    monkeypatch.setattr(programs, "make_step", real)
    loop.train(config, workdir)
    assert _lines(workdir / "metrics.jsonl") == _lines(reference / "metrics.jsonl")
    a, b = (load_file(w / "adapter" / adapters.TENSORS) for w in (workdir, reference))
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_a_damaged_checkpoint_is_skipped_and_the_one_before_taken(whole, files, tmp_path):
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    for file in (workdir / "checkpoints" / "6" / "arrays").glob("ocdbt.process_0/d/*"):
        file.write_bytes(file.read_bytes()[:100])
    result = loop.train(tiny_run.config(*files, method__dropout="0.1"), workdir)
    assert result["step"] == 6
    for name in (f"adapter/{adapters.TENSORS}", "metrics.jsonl"):
        assert (workdir / name).read_bytes() == (whole[0] / name).read_bytes()
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4", "6"]
    assert [p.name for p in (workdir / "checkpoints.damaged").iterdir()] == ["6"]


def test_memory_check_may_be_turned_off_in_a_run_that_goes_on(whole, files):
    config = tiny_run.config(*files, method__dropout="0.1", train__check_memory="False")
    assert loop.train(config, whole[0])["step"] == 6


def test_refuses_another_config_and_another_base(whole, files, tmp_path):
    workdir, _ = whole
    with pytest.raises(ValueError, match="method.rank is 4 there and 8 here"):
        loop.train(tiny_run.config(*files, method__dropout="0.1", method__rank="8"), workdir)
    other = tiny_run.base_folder(tmp_path / "other", seed=1)
    config = tiny_run.config(other, files[1], method__dropout="0.1")
    loop_dir = tmp_path / "run"
    loop.train(tiny_run.config(*files, train__steps="2"), loop_dir)
    (loop_dir / "config.json").unlink()
    config = tiny_run.config(other, files[1], train__steps="2")
    with pytest.raises(ValueError, match="another base .fingerprint"):
        loop.train(config, loop_dir)


def test_a_loss_that_is_not_finite_names_step_and_batch(files, tmp_path, monkeypatch):
    real = step.State.create

    def poisoned(trainable, optimizer):
        import jax

        return real(jax.tree.map(lambda x: x * np.nan, trainable), optimizer)

    monkeypatch.setattr(loop.State, "create", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 1: .*batch 0 of seed 0.*learning_rate"):
        loop.train(tiny_run.config(*files, data__valid="None"), tmp_path / "run")


def test_warm_start_takes_the_values(whole, files, tmp_path):
    base = setup.open_base(**tiny_run.config(*files)["model"], mesh={"data": 1, "fsdp": 1})
    folder = str(whole[0] / "adapter")
    settings = tiny_run.config(*files, method__dropout="0.1")["method"]
    warm = setup.start(base, settings, seed=5, warm_start=folder)
    own = setup.attach(base, folder)
    import jax

    jax.tree.map(np.testing.assert_array_equal, warm.part.trainable, own.part.trainable)
    with pytest.raises(ValueError, match="does not fit config.method"):
        setup.start(base, {**settings, "rank": 2}, seed=5, warm_start=folder)
    with pytest.raises(ValueError, match="scale' is not what it is there.*: alpha 16.0 there, 64.0 here"):
        setup.start(base, {**settings, "alpha": 64.0}, seed=5, warm_start=folder)
    with pytest.raises(ValueError, match="init 'pissa' moves '.*kernel' of the base"):
        setup.start(base, {**settings, "init": "pissa"}, seed=5, warm_start=folder)


def test_a_start_made_from_data(files, tmp_path):
    """Ranks are decided once and kept; a run that goes on has them, and the batches are trained on all the same."""
    config = tiny_run.config(*files, method__init="eva", calibration__batches="2", train__steps="4")
    result = loop.train(config, tmp_path / "whole")
    decided = json.loads((tmp_path / "whole" / loop.CALIBRATION).read_text())
    written = json.loads((tmp_path / "whole" / "adapter" / adapters.PEFT_CONFIG).read_text())
    assert decided["rank_pattern"] and written["rank_pattern"] == decided["rank_pattern"]
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "4")
    again = loop.train(config, tmp_path / "half")
    assert (again["step"], again["loss"]) == (4, result["loss"])
    plain = loop.train(tiny_run.config(*files, train__steps="1"), tmp_path / "plain")
    first = _lines(tmp_path / "whole" / "metrics.jsonl")[1]["loss"]
    assert first == pytest.approx(plain["loss"], rel=1e-5)  # B is zero: the same loss on the same batch


def test_a_start_made_from_the_originals_of_a_packed_base(files, tmp_path):
    """LoftQ reads the file again: with the base in bits the first loss is nearer to that of the base itself."""
    packed = "(('(q|k|v|o|gate|up)_proj/kernel$', {'fmt': 'nf4', 'group': 32}),)"
    first = {}
    for name, overrides in {
        "dense": {},
        "plain": {"model__quantize": packed},
        "loftq": {"model__quantize": packed, "method__init": "loftq"},
    }.items():
        config = tiny_run.config(*files, **{"train__steps": "1", "method__rank": "16", **overrides})
        first[name] = loop.train(config, tmp_path / name)["loss"]
    assert abs(first["loftq"] - first["dense"]) < 0.5 * abs(first["plain"] - first["dense"])


def test_a_chain_that_begins_with_a_text(files, tmp_path):
    """MAM: a folder for each part; the run that goes on, the folder read again and what generates are the same."""
    text = "add 1 and 2, add 3 and 4"
    overrides = {
        "method__name": "prefix+adapter",
        "method__prefix__length": "4",
        "method__prefix__init": "tokens",
        "method__prefix__init_text": text,
        "method__adapter__size": "4",
        "method__adapter__placement": "scaled_parallel",
        "train__steps": "4",
    }
    config = tiny_run.config(*files, **overrides)
    result = loop.train(config, tmp_path / "whole")
    folder = tmp_path / "whole" / "adapter"
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", adapters.OWN_CONFIG, "prefix"]
    assert json.loads((folder / "prefix" / adapters.PEFT_CONFIG).read_text())["peft_type"] == "PREFIX_TUNING"
    assert (folder / "adapter" / adapters.OWN_CONFIG).exists()
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "4")
    again = loop.train(config, tmp_path / "half")
    assert (again["step"], again["loss"]) == (4, result["loss"])

    base = setup.open_base(**config["model"], mesh={"data": 1, "fsdp": 1})
    started = setup.start(base, config["method"], seed=0)
    ids = base.tokenizer(text)["input_ids"]
    cache = base.model.init_cache(1, len(ids))
    cache = base.model.apply({"params": base.params}, np.array([ids]), cache=cache, method="hidden")[1]
    leaf = started.part.trainable["model"]["layers"]["self_attn"]["core_attn"]["prefix"]["default"]["v"]
    expected = np.asarray(cache["v"])[:, 0, :, :4].swapaxes(1, 2).reshape(leaf.shape)
    np.testing.assert_allclose(leaf, expected, atol=1e-5)

    attached = setup.attach(base, folder)
    assert attached.method.name == "prefix+adapter"
    rows = setup.valid_rows(base, config["data"])
    found = evaluate.nll(attached.apply, attached.params, rows)["nll"]
    assert found == pytest.approx(result["best"][1], rel=1e-6)


def test_a_prompt_that_begins_with_a_text(files):
    config = tiny_run.config(*files, method__name="prompt", method__length="5", method__init="tokens")
    base = setup.open_base(**config["model"], mesh={"data": 1, "fsdp": 1})
    run = setup.start(base, {**config["method"], "init_text": "add 1"}, seed=0)
    ids = base.tokenizer("add 1")["input_ids"]
    table = np.asarray(base.params["model"]["embed_tokens"]["embedding"])
    leaf = run.part.trainable["model"]["embed_tokens"]["prompt"]["default"]["p"]
    np.testing.assert_array_equal(leaf, table[np.resize(ids, 5)])
    assert run.method.config["init_ids"] == tuple(ids)


def test_tasks_of_a_file(files, tmp_path):
    """A column task_id: each row's own prompt in training and on valid; a task that does not exist stops the run."""
    rows = [json.loads(line) | {"task_id": i % 3} for i, line in enumerate(files[1].read_text().splitlines())]
    data = tmp_path / "tasks.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    overrides = {"method__name": "multitask_prompt", "method__length": "3", "train__steps": "2"}
    config = tiny_run.config(files[0], data, **overrides, method__tasks="3")
    result = loop.train(config, tmp_path / "run")
    start, end = (load_file(p / adapters.TENSORS)["prefix_task_cols"] for p in _adapters(config, result, tmp_path))
    assert (np.abs(end - start).reshape(3, -1).max(1) > 0).all()
    with pytest.raises(FloatingPointError, match="step 1"):
        short = tiny_run.config(files[0], data, **overrides, method__tasks="2", data__valid="None")
        loop.train(short, tmp_path / "short")


def _adapters(config, result, tmp_path):
    """The folders of a start and of what a run left."""
    base = setup.open_base(**config["model"], mesh={"data": 1, "fsdp": 1})
    run = setup.start(base, config["method"], seed=config["train"]["init_seed"])
    return adapters.save(tmp_path / "start", run.part, run.method, base.sites), Path(result["adapter"])
