"""Members as processes of this machine, which share its cores."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import logging

NICE = 10  # whoever works at this machine comes first


def submit(members: Mapping[Path, Sequence[str]], workdir: Path, *, jobs: int = 1) -> None:
    """Run the members, `jobs` at a time, each on cores of its own; SIGTERM and Ctrl-C let them save and end."""
    del workdir
    if not isinstance(jobs, int):
        raise ValueError(f"--set jobs={jobs}: want a whole number")
    cores = sorted(os.sched_getaffinity(0))
    jobs = max(1, min(jobs, len(members), len(cores)))
    shares = [cores[i::jobs] for i in range(jobs)]
    waiting, running = list(members), {}
    stopping = False

    def stop(*_):
        nonlocal stopping
        stopping = True
        for process, _ in running.values():
            process.send_signal(signal.SIGTERM)

    old = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        while running or (waiting and not stopping):
            while waiting and len(running) < jobs and not stopping:
                folder = waiting.pop(0)
                share = next(i for i in range(jobs) if i not in running)
                running[share] = (_start(members[folder], folder, shares[share]), folder)
            time.sleep(0.2)
            for share, (process, folder) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[share]
                    (logging.info if code == 0 else logging.warning)("%s: ended with %s", folder.name, code)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def _start(command: Sequence[str], folder: Path, cores: Sequence[int]) -> subprocess.Popen:
    kept = ["nice", "-n", str(NICE), "taskset", "-c", ",".join(map(str, cores))]
    kept = kept if all(map(shutil.which, ("nice", "taskset"))) else []
    env = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    with (folder / "log.txt").open(
        "ab"
    ) as log:  # a session of its own: Ctrl-C reaches only the parent, who says SIGTERM
        return subprocess.Popen([*kept, *command], stdout=log, stderr=log, env=env, start_new_session=True)
