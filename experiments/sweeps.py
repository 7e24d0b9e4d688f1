"""What the experiments that are sweeps share."""

from collections.abc import Mapping
from pathlib import Path

from peftax import sweep


def require_finished(found: Mapping[Path, str]) -> None:
    """Leave with a line about the first member that has not finished: {folder: its status}."""
    for folder, status in found.items():
        if status != "finished":
            why = f": {sweep.error(folder)}" if status == "failed" else "; the same command goes on"
            raise SystemExit(f"{folder} is {status}{why}")
