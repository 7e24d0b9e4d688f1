"""A whole run on a tiny base: what it writes, that it goes on where it stopped, what it refuses.

Killed processes stand in kill_test.py.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from peftax.train import loop, setup, step
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

    real = loop.make_step
    calls = []

    def dying(*args, **kwargs):
        inner = real(*args, **kwargs)

        def step_fn(*a):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("the machine went away")
            return inner(*a)

        return step_fn

    monkeypatch.setattr(loop, "make_step", dying)
    workdir = tmp_path / "run"
    with pytest.raises(RuntimeError):
        loop.train(config, workdir)
    monkeypatch.setattr(loop, "make_step", real)
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
