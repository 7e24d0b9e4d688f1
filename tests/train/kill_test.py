"""Kill -9 at random moments of a run's life: resumed each time, it ends with the bits of the undisturbed run.

SIGTERM, by contrast, saves first. Every run is a process of its own (`peftax train`). Once by hand with the
quickstart's base, which is fetched where the cache lacks it:

  python -m pytest -m slow tests/train/kill_test.py -k smollm2 -s
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peftax.weights import adapters
from tests.train import tiny_run

METHODS = {
    "lora": {"method.name": "lora", "method.rank": 4, "method.dropout": 0.1},
    "pissa": {"method.name": "lora", "method.rank": 4, "method.init": "pissa"},
    "vera": {"method.name": "vera", "method.rank": 16, "method.dropout": 0.1},
}
SAME = ("metrics.jsonl", f"adapter/{adapters.TENSORS}", "adapter/adapter_config.json", "config.json")
EVERY = 3  # steps between saves: a life has many, so that kills meet them


class Runs:
    """Processes that all give the same command, each in a workdir."""

    def __init__(self, options: dict, cache: Path, recipe: str = "default"):
        self.options, self.recipe = options, recipe
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
        self.env = {
            **os.environ,
            "XLA_FLAGS": flags,
            "JAX_COMPILATION_CACHE_DIR": str(cache),  # a resumed process need not compile anew
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, workdir: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "peftax.cli", "train", f"--config={self.recipe}", f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in self.options.items()]
        log = (workdir.parent / f"{workdir.name}.log").open("ab")
        return subprocess.Popen(command, env=self.env, stdout=log, stderr=log)

    def finish(self, workdir: Path) -> None:
        code = self.start(workdir).wait()
        assert code == 0, (workdir.parent / f"{workdir.name}.log").read_text()[-2000:]


def lines(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def saving(workdir: Path) -> bool:
    """Is a checkpoint being written?"""
    folder = workdir / "checkpoints"
    return folder.exists() and any("tmp" in name for name in os.listdir(folder))


def wait_for(process: subprocess.Popen, happened) -> None:
    """Until it happened or the process ended; looks every half millisecond, since a save takes some twenty."""
    while not happened() and process.poll() is None:
        time.sleep(0.0005)


def kill(
    process: subprocess.Popen, workdir: Path, where: str, rng: random.Random, starting: float, reach: int
) -> float:
    """Kill -9 at a random moment: of its start ("anywhere"), up to `reach` lines of metrics on ("step"), in a save.

    Returns:
      how long a process takes to its first step, seen again where that was awaited.
    """
    began, before = time.time(), lines(workdir)
    if where == "anywhere":
        time.sleep(rng.uniform(0, 1.1 * starting))
    else:
        wait_for(process, lambda: lines(workdir) != before)  # a resumed run cuts them first
        starting = min(starting, time.time() - began)
    if where == "step":
        at = lines(workdir) + rng.randint(1, reach)
        wait_for(process, lambda: lines(workdir) >= at)
        time.sleep(rng.uniform(0, 0.01))
    if where == "save":
        for _ in range(rng.randint(1, max(2, reach // 4))):
            wait_for(process, lambda: not saving(workdir))
            wait_for(process, lambda: saving(workdir))
        time.sleep(rng.choice([0, rng.uniform(0, 0.02)]))
    assert process.poll() is None, f"the run was over before it was killed ({where}): give it more steps"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return starting


def terminate(process: subprocess.Popen, workdir: Path) -> None:
    """SIGTERM saves after the step it meets and ends with status 0."""
    before = lines(workdir)
    wait_for(process, lambda: lines(workdir) > before)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    said = json.loads((workdir.parent / f"{workdir.name}.log").read_text().splitlines()[-1])
    assert said["step"] == last and str(last) in _checkpoints(workdir)


def differing(a: Path, b: Path) -> list[str]:
    return [name for name in SAME if (a / name).read_bytes() != (b / name).read_bytes()]


def survives(runs: Runs, folder: Path, kills: int, seed: int, reach: int = 20) -> None:
    rng = random.Random(seed)
    whole, workdir = folder / "whole", folder / "killed"
    began = time.time()
    process = runs.start(whole)
    wait_for(process, lambda: lines(whole) > 1)
    starting = time.time() - began
    assert process.wait() == 0, (folder / "whole.log").read_text()[-2000:]
    print(f"seed {seed}, {kills} kills; a process takes {starting:.1f} s to its first step")
    in_saves = 0
    for i in range(kills):
        where = ("save", "step", "anywhere")[i % 3]
        starting = kill(runs.start(workdir), workdir, where, rng, starting, reach)
        in_saves += saving(workdir)
        print(f"kill {i + 1} ({where}): {lines(workdir)} lines, checkpoints {_checkpoints(workdir)}", flush=True)
    assert in_saves or kills < 10  # some left a half-written checkpoint
    terminate(runs.start(workdir), workdir)
    runs.finish(workdir)
    assert differing(workdir, whole) == []
    assert not saving(workdir) and not list(workdir.glob(".adapter*"))
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {key for m in metrics for key in m} <= {"step", "loss", "weight", "grad_norm", "learning_rate", "valid_nll"}


def _checkpoints(workdir: Path) -> list[str]:
    folder = workdir / "checkpoints"
    return sorted(os.listdir(folder)) if folder.exists() else []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A function from a method's name to its runs on the tiny base."""
    folder = tmp_path_factory.mktemp("files")
    base, data = tiny_run.base_folder(folder / "base"), tiny_run.data_file(folder / "data.jsonl")

    def runs(method: str, steps: int) -> Runs:
        options = {
            **METHODS[method],
            "model.path": base,
            "data.train": data,
            "data.valid": data,
            "data.length": 64,
            "train.steps": steps,
            "train.batch_size": 8,
            "train.eval_every": 4 * EVERY,
            "train.save_every": EVERY,
            "train.tensorboard": False,
        }
        return Runs(options, folder / "programs")

    return runs


@pytest.mark.parametrize("method", [m if m == "lora" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_killed_three_times(tiny, tmp_path, method):
    survives(tiny(method, steps=60), tmp_path, kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_twenty_times(tiny, tmp_path, method):
    survives(tiny(method, steps=240), tmp_path, kills=20, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_twenty_times_smollm2(tmp_path, method):
    options = {
        **METHODS[method],
        "data.train_length": 128,
        "data.valid_limit": 4,
        "train.steps": 60,
        "train.batch_size": 1,
        "train.eval_every": 20,
        "train.save_every": 1,
        "train.chunk": 64,
        "train.tensorboard": False,
    }
    survives(Runs(options, tmp_path / "programs", "smollm2_lora"), tmp_path, kills=20, seed=2, reach=5)
