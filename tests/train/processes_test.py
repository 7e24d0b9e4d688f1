"""Real processes that train together: as one would, killed, stopped, and gone on with by another number of them."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from peftax import processes, recipe
from peftax.train import loop
from tests.train import tiny_run
from tests.train.kill_test import differing, lines, wait_for

OWN_CODE = {"sgd": (1e-5, 0.3), "adamw": (1e-4, 0.01)}  # how far losses may be from one process's; learning rate


@dataclasses.dataclass
class Together:
    """`peftax` commands that n processes give together, each with some fake devices."""

    folder: Path
    options: dict

    def config(self, **more) -> dict:
        return recipe.load("default", [(k, str(v)) for k, v in {**self.options, **more}.items()]).to_dict()

    def train(self, n: int, workdir: Path, *, devices: int = 2, **more) -> list[subprocess.Popen]:
        flags = [f"--config.{key}={value}" for key, value in {**self.options, **more}.items()]
        return self.start(n, ["train", "--config=default", f"--workdir={workdir}", *flags], devices)

    def start(self, n: int, command: list[str], devices: int = 2) -> list[subprocess.Popen]:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        env = {
            **os.environ,
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}"),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        started = []
        for i in range(n):
            which = [f"--coordinator=localhost:{port}", f"--processes={n}", f"--process={i}"] if n > 1 else []
            with self.log(i).open("wb") as err, (self.folder / f"{i}.out").open("wb") as out:
                own = [sys.executable, "-m", "peftax.cli", *command, *which]
                started.append(subprocess.Popen(own, env=env, stdout=out, stderr=err))
        return started

    def log(self, i: int) -> Path:
        return self.folder / f"{i}.err"

    def said(self, i: int) -> str:
        """A process's results; Gloo, which only CPUs use, prints too, from threads that cut each other's lines."""
        said = (self.folder / f"{i}.out").read_text().splitlines(keepends=True)
        return "".join(line for line in said if line.startswith("{"))

    def finish(self, started: list[subprocess.Popen], timeout: float = 300) -> None:
        codes = [p.wait(timeout) for p in started]
        assert not any(codes), "\n".join(self.log(i).read_text()[-2000:] for i in range(len(started)))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    base, data = tiny_run.base_folder(folder / "base"), tiny_run.data_file(folder / "data.jsonl")
    options = {
        "model.path": base,
        "data.train": data,
        "data.valid": data,
        "data.length": 64,
        "method.rank": 4,
        "method.dropout": 0.1,
        "optimizer.learning_rate": 0.01,
        "train.steps": 20,
        "train.batch_size": 8,
        "train.eval_every": 10,
        "train.save_every": 10,
    }
    return Together(folder, options)


def here(workdir: Path, config: dict, devices: int = 1) -> Path:
    """The run in this process, on so many devices."""
    with pytest.MonkeyPatch.context() as patch:
        own = jax.devices()[:devices]
        patch.setattr("peftax.sharding.jax.devices", lambda: own)
        loop.train(config, workdir)
    return workdir


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def distance(a: Path, b: Path) -> float:
    """The largest relative difference of two runs' losses; the lines themselves must be the same."""
    mine, theirs = metrics(a), metrics(b)
    assert [(m["step"], set(m)) for m in mine] == [(m["step"], set(m)) for m in theirs]
    both = [(x[k], y[k]) for x, y in zip(mine, theirs, strict=True) for k in ("loss", "valid_nll") if k in x]
    return max(abs(x - y) / abs(x) for x, y in both)


@pytest.fixture(scope="module")
def one(together):
    return here(together.folder / "one", together.config())


@pytest.fixture(scope="module")
def two(together):
    """The same run by two processes with two devices each, weights and adapter split over all four."""
    workdir = together.folder / "two"
    together.finish(together.train(2, workdir))
    return workdir, [together.said(i) for i in range(2)], [together.log(i).read_text() for i in range(2)]


def test_two_processes_train_as_one(one, two):
    workdir, _, _ = two
    assert distance(one, workdir) <= 1e-4
    mine, theirs = (load_file(w / "adapter" / "adapter_model.safetensors") for w in (one, workdir))
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        np.testing.assert_allclose(theirs[name], x, atol=1e-4 * np.abs(x).max(), err_msg=name)


def test_the_first_process_writes_and_talks(two):
    workdir, said, logs = two
    assert json.loads(said[0])["step"] == 20 and said[1] == ""
    assert "train (at most 64 tokens)" in logs[0] and "train" not in logs[1]  # whichever read the data
    assert len(list((workdir / "tensorboard").iterdir())) == 1 and lines(workdir) == 23
    shards = {p.name for p in (workdir / "checkpoints" / "20" / "arrays").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= shards  # each wrote its own


@pytest.mark.parametrize("mesh", [{"mesh.fsdp": 4}, {"mesh.data": 2, "mesh.fsdp": 2}])
def test_one_process_goes_on_on_another_mesh(together, two, tmp_path, mesh):
    workdir = shutil.copytree(two[0], tmp_path / "copy")
    shutil.rmtree(workdir / "checkpoints" / "20")
    here(workdir, together.config(**mesh), devices=4)
    assert distance(two[0], workdir) <= 1e-4
    assert metrics(workdir)[:11] == metrics(two[0])[:11]
    assert metrics(workdir)[11:] != metrics(two[0])[11:]  # it did go on by itself


@pytest.mark.slow
@pytest.mark.parametrize("n, devices", [(2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("optimizer", OWN_CODE)
def test_losses_are_those_of_one_process(together, tmp_path, n, devices, optimizer):
    tolerance, rate = OWN_CODE[optimizer]
    own = {"optimizer.name": optimizer, "optimizer.learning_rate": rate}
    reference = here(tmp_path / "one", together.config(**own))
    together.finish(together.train(n, tmp_path / "several", devices=devices, **own))
    assert (found := distance(reference, tmp_path / "several")) <= tolerance
    print(f"{n} processes x {devices} devices, {optimizer}: {found:.1e}")


@pytest.mark.slow
@pytest.mark.parametrize("n, devices, mesh", [(4, 1, {}), (4, 1, {"mesh.data": 2}), (2, 2, {"mesh.data": 4})])
def test_other_processes_go_on(together, two, tmp_path, n, devices, mesh):
    workdir = shutil.copytree(two[0], tmp_path / "copy")
    shutil.rmtree(workdir / "checkpoints" / "20")
    together.finish(together.train(n, workdir, devices=devices, **mesh))
    assert distance(two[0], workdir) <= 1e-4 and metrics(workdir)[:11] == metrics(two[0])[:11]


METHODS = {
    "accumulated": {"train.accumulate": 2, "train.batch_size": 4},
    "pissa": {"method.init": "pissa"},
    "eva": {"method.init": "eva"},
    "dora": {"method.name": "dora"},
    "prefix": {"method.name": "prefix", "method.rank": None, "method.dropout": None},
    "nf4": {"model.quantize": (("self_attn/[qkv]_proj/kernel$", {"fmt": "nf4", "group": 32}),)},
    "new tokens": {"model.new_tokens": ("<a>", "<b>"), "method.tokens": ("<a>", "<b>")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_methods_train_as_in_one_process(together, tmp_path, name):
    own = {"train.steps": 4, "train.eval_every": 2, "train.save_every": 2, **METHODS[name]}
    base = {k: v for k, v in together.options.items() if own.get(k, v) is not None}
    runs = dataclasses.replace(together, options={**base, **{k: v for k, v in own.items() if v is not None}})
    reference = here(tmp_path / "one", runs.config())
    runs.finish(runs.train(2, tmp_path / "two"))
    assert distance(reference, tmp_path / "two") <= 1e-4
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "4")
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    runs.finish(runs.train(2, tmp_path / "again"))
    assert differing(tmp_path / "two", tmp_path / "again") == []


@pytest.mark.slow
def test_killed_stopped_and_gone_on_with_bit_for_bit(together, tmp_path):
    """SIGKILL of each in turn, then SIGTERM of one: what comes out is what nobody disturbed."""
    own = {"train.steps": 120, "train.save_every": 10, "train.eval_every": 40}
    whole, workdir = tmp_path / "whole", tmp_path / "killed"
    together.finish(together.train(2, whole, **own))
    for victim in (1, 0):
        started, before = together.train(2, workdir, **own), lines(workdir)
        wait_for(started[0], lambda before=before: lines(workdir) != before)  # a resumed run cuts them first
        at = lines(workdir) + 15
        wait_for(started[0], lambda at=at: lines(workdir) >= at)
        started[victim].send_signal(signal.SIGKILL)
        other = 1 - victim
        code = started[other].wait(30)
        log = together.log(other).read_text()
        assert started[victim].wait() == -signal.SIGKILL and code not in (0, None)
        assert "peftax train: another process is gone" in log or "another task died" in log
        assert victim == 0 or (code == 1 and "Traceback" not in log)
    started, before = together.train(2, workdir, **own), lines(workdir)
    wait_for(started[0], lambda: lines(workdir) != before)
    at = lines(workdir) + 1
    wait_for(started[0], lambda: lines(workdir) >= at)
    started[1].send_signal(signal.SIGTERM)
    together.finish(started, 120)
    said = json.loads(together.said(0))
    assert said["step"] < 120 and (workdir / "checkpoints" / str(said["step"])).exists()
    together.finish(together.train(2, workdir, **own))
    assert differing(workdir, whole) == [] and not list(workdir.glob(".adapter*"))


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others(together, tmp_path):
    """It is alive to the network, and dead to the heartbeat."""
    started = together.train(2, tmp_path / "run", **{"train.steps": 10**6, "train.eval_every": 10**6})
    wait_for(started[0], lambda: lines(tmp_path / "run") > 3)
    started[1].send_signal(signal.SIGSTOP)
    try:
        assert started[0].wait(3 * processes.HEARTBEAT) != 0
        assert "heartbeat" in together.log(0).read_text()
    finally:
        for p in started:
            p.kill()


@pytest.mark.slow
def test_two_processes_evaluate_and_fold(together, two, tmp_path):
    base, data = (str(together.options[k]) for k in ("model.path", "data.train"))
    adapter = [f"--base={base}", f"--adapter={two[0] / 'adapter'}", f"--data={data}"]
    said = {}
    for n in (1, 2):
        together.finish(together.start(n, ["evaluate", *adapter], 4 // n))
        said[n] = json.loads(together.said(0))
        together.finish(together.start(n, ["merge", *adapter, f"--into={tmp_path / str(n)}"], 4 // n))
        assert together.said(1) == "" or n == 1
    assert said[1]["tokens"] == said[2]["tokens"] and abs(said[1]["nll"] - said[2]["nll"]) <= 1e-5 * said[1]["nll"]
    mine, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("1", "2"))
    for name, x in mine.items():
        np.testing.assert_allclose(theirs[name], x, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_one_that_fails_ends_all(together, tmp_path):
    """The first cannot write, and the other does not wait for it."""
    (tmp_path / "run" / "tensorboard").parent.mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    started = together.train(2, tmp_path / "run")
    assert started[0].wait(60) == 1 and "Not a directory" in together.log(0).read_text()
    assert started[1].wait(60) != 0
    assert re.search("another (process is gone|task died)", together.log(1).read_text())


@pytest.mark.parametrize(
    "given, said",
    [
        ({"count": 2, "index": 0}, "want --coordinator too"),
        ({"coordinator": "host:1"}, "want --processes, --process too"),
        ({"coordinator": "host", "count": 2, "index": 0}, "--coordinator=host names no port"),
    ],
)
def test_flags_that_do_not_suffice(given, said):
    with pytest.raises(ValueError, match=said):
        processes.start(**given)


def test_one_process_alone_needs_nothing(monkeypatch):
    processes.start(count=1)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    processes.start()
    assert not processes.several() and processes.first()
    assert processes.anyone(True) and not processes.anyone(False)
