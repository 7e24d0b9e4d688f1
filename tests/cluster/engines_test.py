"""A sweep of six on a real Slurm and on a real Ray cluster: one member is killed, one cannot train, nothing is lost.

launch/README.md says how to have both on this machine.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peftax import sweep
from tests.train import tiny_run
from tests.train.kill_test import differing, lines

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parent.parent.parent
STEPS = 300
RECIPE = f"""
from pathlib import Path
from peftax.configs import default

HERE = Path(__file__).parent


def get_config():
    config = default.get_config()
    config.model.path = str(HERE / "base")
    config.data.train = config.data.valid = config.data.test = str(HERE / "rows.jsonl")
    config.data.length = 64
    config.method = {{"name": "lora", "rank": 4, "dropout": 0.1}}
    config.train.steps = {STEPS}
    config.train.batch_size = 8
    config.train.eval_every = 100
    config.train.save_every = 20
    config.train.tensorboard = False
    return config


def sweep(add):
    for rate in (0.001, 0.003, 0.01, 0.03, 0.1):
        add({{"optimizer.learning_rate": rate, "seed": 0}})
    add({{"optimizer.learning_rate": 0.01, "seed": 0, "data.train": str(HERE / "gone.jsonl")}})
"""
SETTINGS = {"slurm": ("parallel=2", "cpus=1", "minutes=30"), "ray": ("address=auto", "cpus=1")}
NEEDS = {"slurm": "SLURM_CONF", "ray": "RAY_ADDRESS"}


class Sweep:
    """The same command again and again."""

    def __init__(self, engine: str, here: Path, name: str):
        self.workdir, self.log, self.began = here / name, here / f"{name}.log", time.time()
        self.command = [sys.executable, "-m", "peftax.cli", "sweep", f"--config={here / 'recipe.py'}", f"--on={engine}"]
        self.command += [f"--workdir={self.workdir}", "--together=1", "--extend=0"]
        self.command += [word for setting in SETTINGS[engine] for word in ("--set", setting)]

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(self.command, env=ENV, stdout=subprocess.PIPE, stderr=self.log.open("ab"), text=True)

    def statuses(self) -> dict[str, str]:
        return {f.parent.name: sweep.status(f.parent) for f in sorted(self.workdir.glob("*/member.json"))}

    def note(self, what: str) -> None:
        print(f"{self.workdir.name}: {what} after {time.time() - self.began:.0f} s")


ENV = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Base, data and recipe, and what the member that will be killed comes to where nobody kills it."""
    into = tmp_path_factory.mktemp("engines")
    tiny_run.base_folder(into / "base")
    tiny_run.data_file(into / "rows.jsonl")
    (into / "recipe.py").write_text(RECIPE)
    ENV["JAX_COMPILATION_CACHE_DIR"] = str(into / "programs")
    whole = sweep.lay_out(str(into / "recipe.py"), into / "undisturbed")[2]
    subprocess.run(sweep.command(whole), env=ENV, check=True, capture_output=True)
    return into


def trainer(folder: Path) -> int | None:
    """The number of the process that trains a member."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if words[1:4] == [b"-m", b"peftax.sweep", bytes(folder)]:
            return int(file.parent.name)
    return None


def until(happened, timeout: float = 600):
    end = time.time() + timeout
    while not (found := happened()):
        assert time.time() < end, "it never happened"
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("engine", SETTINGS)
def test_nothing_is_lost(engine, here):
    if NEEDS[engine] not in os.environ:
        pytest.skip(f"{NEEDS[engine]} names no cluster: see launch/README.md")
    run = Sweep(engine, here, engine)
    whole = next(f for f in here.glob("undisturbed/*/") if (f / "result.json").exists())
    victim = run.workdir / whole.name
    process = run.start()
    until(lambda: lines(victim) > 50)
    os.kill(until(lambda: trainer(victim)), signal.SIGKILL)
    run.note(f"{victim.name} killed at line {lines(victim)} of {STEPS}")
    told = process.communicate(timeout=1200)[0]
    run.note("first call ended")
    assert process.returncode == 1, told + run.log.read_text()
    statuses = run.statuses()
    assert sorted(statuses.values()) == ["failed", *["finished"] * 4, "stopped"], statuses
    assert statuses[victim.name] == "stopped" and lines(victim) < STEPS
    assert "FileNotFoundError: no data file at" in told and told.count("finished") == 4
    finished = {f: f.stat().st_mtime for f in run.workdir.glob("*/result.json")}

    process = run.start()
    told = process.communicate(timeout=1200)[0]
    run.note("second call ended")
    assert process.returncode == 1 and told.count("finished") == 5, told + run.log.read_text()  # one has failed
    assert {f: f.stat().st_mtime for f in finished} == finished
    assert lines(victim) == lines(whole) and differing(victim, whole) == []
    assert json.loads((victim / "result.json").read_text())["valid"] == pytest.approx(
        json.loads((whole / "result.json").read_text())["valid"], rel=0
    )
    read = [f.parent.name for f in run.workdir.glob("*/test.json")]  # by the engine too, once a choice could be made
    assert len(read) == 1 and sweep.said(run.workdir)["test"] == read


def test_a_member_whose_job_slurm_queues_again_goes_on_by_itself(here):
    if "SLURM_CONF" not in os.environ:
        pytest.skip("SLURM_CONF names no cluster: see launch/README.md")
    run = Sweep("slurm", here, "requeued")
    whole = next(f for f in here.glob("undisturbed/*/") if (f / "result.json").exists())
    victim = run.workdir / whole.name
    process = run.start()
    until(lambda: lines(victim) > 50)
    environment = Path(f"/proc/{until(lambda: trainer(victim))}/environ").read_bytes().split(b"\0")
    job = dict(word.split(b"=", 1) for word in environment if b"=" in word)[b"SLURM_JOB_ID"].decode()
    subprocess.run(["scontrol", "requeue", job], check=True)
    run.note(f"job {job} queued again at line {lines(victim)} of {STEPS}")
    told = process.communicate(timeout=1200)[0]
    run.note("ended")
    assert told.count("finished") == 5, told + run.log.read_text()
    assert lines(victim) == lines(whole) and differing(victim, whole) == []
