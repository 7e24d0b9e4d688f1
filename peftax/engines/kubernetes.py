"""Members as one JobSet of Kubernetes: a manifest is written, and whoever may, applies it."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftax.weights.source import write_json


def submit(
    members: Mapping[Path, Sequence[str]],
    workdir: Path,
    *,
    image: str,
    claim: str,
    mount: str = "/runs",
    parallel: int = 8,
    retries: int = 3,
    resources: Mapping[str, Any] | None = None,
    selector: Mapping[str, str] | None = None,
) -> None:
    """Write WORKDIR/jobset.yaml: an indexed job, whose each index trains one member and is tried again after a kill.

    Each call's job has a name and a list of members of its own, so that one which still runs keeps its list, and one
    which has ended stands in nobody's way.

    Args:
      image: with peftax in it.
      claim: the persistent volume claim that holds the sweep's folder, mounted at `mount` under its own name.
      parallel: members at one time.
      retries: of one member; it goes on where it was.
      resources: limits of one pod, such as {"nvidia.com/gpu": 1}.
      selector: labels of nodes, such as {"cloud.google.com/gke-tpu-topology": "2x4"}.
    """
    groups = [
        [Path(word).name for word in command[3:]] for command in members.values()
    ]  # behind python -m peftax.sweep
    now = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    indices = workdir / f"indices-{now}.json"
    write_json(indices, groups)
    pod = {
        "restartPolicy": "Never",
        "containers": [
            {
                "name": "member",
                "image": image,
                "command": ["python", "-m", "peftax.sweep", f"{mount}/{workdir.name}/{indices.name}"],
                "volumeMounts": [{"name": "runs", "mountPath": mount}],
                **({"resources": {"limits": dict(resources)}} if resources else {}),
            }
        ],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}],
        **({"nodeSelector": dict(selector)} if selector else {}),
    }
    job = {
        "completionMode": "Indexed",
        "completions": len(groups),
        "parallelism": min(parallel, len(groups)),
        "backoffLimitPerIndex": retries,
        "maxFailedIndexes": len(groups),  # one that fails does not stop the rest
        "template": {"spec": pod},
    }
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": f"{_label(workdir.name)}-{now}"},
        "spec": {"replicatedJobs": [{"name": "members", "replicas": 1, "template": {"spec": job}}]},
    }
    file = workdir / "jobset.yaml"
    write_json(file, manifest)  # JSON is YAML
    print(f"written: {file}; kubectl apply -f {file}", file=sys.stderr)


def _label(name: str) -> str:
    """As Kubernetes wants names, and short: pods add to it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[:24].strip("-") or "sweep"
