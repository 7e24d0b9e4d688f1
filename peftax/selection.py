"""A sweep until its choices can be trusted: an arm whose best learning rate lies at the edge of its grid gets the next
one, and every other arm one more too, so that all are chosen from as many trials.
"""

from __future__ import annotations

import math
from pathlib import Path

from peftax import results, sweep
from peftax.results import Choice

ROUNDS = 3


def run(
    name_or_path: str,
    workdir: str | Path,
    overrides: sweep.Pairs = (),
    *,
    extend: int = ROUNDS,
    retry: bool = False,
    **how,
) -> dict[Path, str]:
    """Run a sweep to its choices; where the engine does not wait, the same call later goes on.

    Args:
      extend: rounds of one more learning rate for every arm, at most; 0: none.
      how: the rest of sweep.run.

    Returns:
      {folder: status}, of the members that were added too.
    """
    found = sweep.run(name_or_path, workdir, overrides, retry=retry, **how)
    while set(found.values()) <= sweep.ENDED and extend_grids(workdir, extend):
        found = sweep.run(name_or_path, workdir, overrides, **how)
    return found


def extend_grids(workdir: str | Path, rounds: int = ROUNDS) -> bool:
    """Add one round to a sweep whose members have all ended; False where there is no need, or there were enough."""
    if len(sweep.said(workdir)["rounds"]) >= rounds:
        return False
    found = choices(workdir)
    if not any(c.edge in ("low", "high") for c in found):
        return False
    rates = {c.members[0]: rate for c in found if (rate := next_rate(c)) is not None}
    if rates:
        sweep.add_round(workdir, rates)
    return bool(rates)


def choices(workdir: str | Path) -> list[Choice]:
    """Of each arm; none where nothing was scored on valid."""
    table = results.load(workdir)
    table = table[table.status.isin(sweep.ENDED)]
    return results.choose(table) if "valid" in table and table.valid.notna().any() else []


def next_rate(choice: Choice) -> float | None:
    """The rate that tells most of an arm: beyond the edge where the best one lies there, as far as the two at the edge
    are apart, else between the best and the better of its neighbours; three digits. None where there is none.
    """
    grid = list(choice.rates)
    if choice.edge in ("only", "none") or not all(math.isfinite(rate) and rate > 0 for rate in grid):
        return None
    if choice.edge:
        last, before = grid[:2] if choice.edge == "low" else grid[:-3:-1]
        rate = last * (last / before)
    else:
        at = grid.index(choice.rate)
        rate = math.sqrt(choice.rate * min(grid[at - 1], grid[at + 1], key=choice.rates.__getitem__))
    rate = float(f"{rate:.3g}")
    return None if rate in grid else rate
