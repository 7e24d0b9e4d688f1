"""What the experiments that are sweeps share."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from peftax import sweep
from peftax.results import Choice


def require_finished(found: Mapping[Path, str]) -> None:
    """Leave with a line about the first member that has not finished: {folder: its status}."""
    for folder, status in found.items():
        if status != "finished":
            why = f": {sweep.error(folder)}" if status == "failed" else "; the same command goes on"
            raise SystemExit(f"{folder} is {status}{why}")


def rates_of(choices: Mapping[str, Choice]) -> pd.DataFrame:
    """A row for each learning rate of each arm: what `figures.draw_rates` draws."""
    rows = [{"arm": arm, "learning rate": r, "valid": v} for arm, c in choices.items() for r, v in c.rates.items()]
    return pd.DataFrame(rows)
