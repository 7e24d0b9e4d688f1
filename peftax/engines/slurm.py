"""Members as a Slurm array, through submitit."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOOK = 2  # seconds between looks at the queue


class Member:
    """What a job of the array does; after a preemption it is queued again and goes on."""

    def __call__(self, command: Sequence[str]) -> int:
        return subprocess.run(command).returncode

    def checkpoint(self, command: Sequence[str]):
        import submitit

        return submitit.helpers.DelayedSubmission(self, command)


def submit(
    members: Mapping[Path, Sequence[str]],
    workdir: Path,
    *,
    parallel: int = 64,
    minutes: int = 24 * 60,
    cpus: int = 2,
    wait: bool = True,
    **slurm: Any,
) -> None:
    """Queue the members as one array of jobs, and wait for them.

    Args:
      parallel: jobs at one time.
      minutes: that a job may take.
      cpus: of each.
      wait: False returns once they are queued.
      slurm: the rest that submitit passes on, by its names: slurm_partition, gpus_per_node, slurm_mem, ...
    """
    try:
        import submitit
    except ImportError:
        raise ValueError("the slurm engine wants submitit: pip install peftax[slurm]") from None
    executor = submitit.AutoExecutor(folder=workdir / "slurm" / "%j", cluster="slurm")
    executor.update_parameters(
        name=workdir.name,
        timeout_min=minutes,
        cpus_per_task=cpus,
        slurm_array_parallelism=min(parallel, len(members)),
        **slurm,
    )
    jobs = executor.map_array(Member(), list(members.values()))
    arrays = {job.job_id.partition("_")[0] for job in jobs}
    while wait and _queued(arrays):
        time.sleep(LOOK)


def _queued(arrays: set[str]) -> bool:
    """Does Slurm hold any of these still? It alone knows of a job that it stopped and queued again: for submitit such a
    one has returned.
    """
    done = subprocess.run(["squeue", "--noheader", f"--jobs={','.join(arrays)}"], capture_output=True, text=True)
    return bool(done.stdout.strip()) if done.returncode == 0 else "Invalid job id" not in done.stderr
