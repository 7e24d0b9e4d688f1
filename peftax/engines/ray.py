"""Members as tasks of a Ray cluster, or of a local one that is started for them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What of this process's environment a member sees too: a cluster's own is that of its start, and says which devices.
PASSED = ("JAX_", "XLA_", "HF_", "PEFTAX_", "TF_CPP_", "PYTHONPATH")


def submit(
    members: Mapping[Path, Sequence[str]],
    workdir: Path,
    *,
    address: str | None = None,
    cpus: float = 1,
    gpus: float = 0,
    **ray_init: Any,
) -> None:
    """Run the members where the cluster has room; the sweep's folder must be the same on all its nodes.

    Args:
      address: of a cluster, "auto" for the one that this node is in; None starts one here.
      cpus, gpus: that one member takes.
      ray_init: the rest, for ray.init.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("the ray engine wants ray: pip install peftax[ray]") from None
    del workdir
    ray.init(address=address, include_dashboard=False, **ray_init)

    @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)
    def member(command: Sequence[str], log: str, given: Mapping[str, str]) -> int:
        with open(log, "ab") as file:
            return subprocess.run(command, stdout=file, stderr=file, env={**os.environ, **given}).returncode

    try:
        given = {key: value for key, value in os.environ.items() if key.startswith(PASSED)}
        tasks = [member.remote(command, str(f.resolve() / "log.txt"), given) for f, command in members.items()]
        for task in tasks:
            try:
                ray.get(task)
            except ray.exceptions.RayError:  # its node died: the member is as it was left, and goes on next time
                continue
    finally:
        ray.shutdown()
