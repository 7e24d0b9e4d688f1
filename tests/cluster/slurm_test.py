"""launch/slurm.sh on a real Slurm; launch/README.md says how to have one on this machine.

SLURM_CONF=.../slurm.conf python -m pytest -m cluster tests/cluster
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train import tiny_run
from tests.train.kill_test import differing, lines

pytestmark = pytest.mark.cluster
SCRIPT = Path(__file__).parent.parent.parent / "launch" / "slurm.sh"
STEPS = 300


def run(*command: object, env: dict | None = None) -> str:
    done = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, env=env)
    return done.stdout.strip()


class Jobs:
    """Jobs of two tasks on one node."""

    def __init__(self, folder: Path):
        base, data = tiny_run.base_folder(folder / "base"), tiny_run.data_file(folder / "data.jsonl")
        options = {
            "model.path": base,
            "data.train": data,
            "data.length": 64,
            "method.rank": 4,
            "train.steps": STEPS,
            "train.batch_size": 8,
            "train.eval_every": STEPS,
            "train.save_every": 50,
            "train.tensorboard": False,
        }
        self.folder, self.flags = folder, [f"--config.{key}={value}" for key, value in options.items()]
        self.env = {
            **os.environ,
            "PYTHON": sys.executable,
            "PYTHONPATH": str(SCRIPT.parent.parent),
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        }

    def submit(self, workdir: Path) -> str:
        size = ["--nodes=1", "--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=30"]
        command = ["sbatch", "--parsable", *size, f"--output={self.folder}/%j.out", SCRIPT, "default", workdir]
        done = subprocess.run(
            [*map(str, command), *self.flags], env=self.env, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def until(self, job: str, happened, timeout: float = 600) -> str:
        """The job's state when it happened."""
        end = time.time() + timeout
        while time.time() < end:
            shown = dict(w.split("=", 1) for w in run("scontrol", "show", "job", job).split() if "=" in w)
            if happened(shown):
                return shown["JobState"]
            assert shown["JobState"] not in ("FAILED", "TIMEOUT", "CANCELLED"), self.said(job)
            time.sleep(0.2)
        raise TimeoutError(self.said(job))

    def said(self, job: str) -> str:
        return (self.folder / f"{job}.out").read_text()[-3000:]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    if "SLURM_CONF" not in os.environ:
        pytest.skip("SLURM_CONF names no cluster: see launch/README.md")
    return Jobs(tmp_path_factory.mktemp("slurm"))


def test_a_job_that_is_killed_and_stopped_ends_as_an_undisturbed_one(jobs, tmp_path):
    whole, workdir = tmp_path / "whole", tmp_path / "disturbed"
    first = jobs.submit(whole)
    jobs.until(first, lambda shown: shown["JobState"] == "COMPLETED")
    job = jobs.submit(workdir)
    jobs.until(job, lambda shown: lines(workdir) > 60)
    run("scancel", "--signal=KILL", f"{job}.0")  # all tasks of the step, not the script
    jobs.until(job, lambda shown: shown["Restarts"] == "1" and shown["JobState"] == "RUNNING" and lines(workdir) > 120)
    run("scancel", "--batch", "--signal=TERM", job)  # as --signal does when the time is nearly over
    jobs.until(job, lambda shown: shown["Restarts"] == "2" and shown["JobState"] == "COMPLETED")
    said = (jobs.folder / f"{job}.out").read_text()
    assert "try 1 of 3: back into the queue" in said and "stopped before its time is over" in said
    assert lines(workdir) == STEPS and differing(workdir, whole) == []
