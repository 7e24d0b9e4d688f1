"""A sweep until its choices can be trusted.

An arm whose best learning rate lies at the edge of its grid gets the next one, and every other arm one more too, so
that all are chosen from as many trials. What was chosen is trained with more seeds where they are asked for. Then test
is read once, of the members of what was chosen. Other data is read of all members whenever it is asked for: what they
have forgotten, for one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from peftax import results, sweep
from peftax.data.source import FORMATS
from peftax.results import Choice
from peftax.weights.source import read_json

ROUNDS = 3


def run(
    name_or_path: str,
    workdir: str | Path,
    overrides: sweep.Pairs = (),
    *,
    extend: int = ROUNDS,
    seeds: Sequence[int] = (),
    measures: Mapping[str, str] | None = None,
    retry: bool = False,
    **how,
) -> dict[Path, str]:
    """Run a sweep to its choices; where the engine does not wait, the same call later goes on.

    Args:
      extend: rounds of one more learning rate for every arm, at most; 0: none.
      seeds: with which the chosen rate of every arm is trained too.
      measures: {name: data} to read of every finished member and of its untouched base, beside those that this sweep
        was asked for before; see train/readings.other.
      how: the rest of sweep.run.

    Returns:
      {folder: status}, of the members that were added too.
    """
    if wrong := [seed for seed in seeds if seed < 0]:
        raise ValueError(f"seeds: {wrong[0]} must be at least 0")
    measures = _measures(workdir, measures or {})
    if sweep.said(workdir)["test"]:
        sweep.say(workdir, test=[])  # until it is sure what is chosen now
    found = sweep.run(name_or_path, workdir, overrides, retry=retry, **how)
    left = {folder: sweep.unread(folder) for folder in found}  # tried, or in the engine's queue
    sweep.say(workdir, measures=measures)
    while sweep.ENDED.issuperset(found.values()) and extend_grids(workdir, extend):
        found = sweep.run(name_or_path, workdir, overrides, **how)
    if seeds and sweep.ENDED.issuperset(found.values()):
        repeat(workdir, seeds)
        found = sweep.run(name_or_path, workdir, overrides, **how)
    if sweep.ENDED.issuperset(found.values()):
        sweep.say(workdir, test=to_test(workdir))
    if any(sweep.unread(folder) != left.get(folder, []) for folder in found):
        found = sweep.run(name_or_path, workdir, overrides, **how)
    return found


def _measures(workdir: str | Path, asked: Mapping[str, str]) -> dict[str, str]:
    """What this sweep was asked to measure before, and now; files by their whole paths."""
    known = dict(sweep.said(workdir)["measures"])
    for name, source in asked.items():
        where, mark, split = source.partition("#")
        if not name.isidentifier() or name == "test":
            raise ValueError(f"a measure cannot be called {name!r}: want one word, and not test")
        if (path := Path(where).expanduser()).exists():
            source = f"{path.resolve()}{mark}{split}"
        elif path.suffix in FORMATS:
            raise FileNotFoundError(f"measure {name}: no data file at {where}")
        if known.setdefault(name, source) != source:
            raise ValueError(f"{workdir}: {name} is measured on {known[name]} there, not {source}; choose another name")
    return known


def to_test(workdir: str | Path) -> list[str]:
    """The members of each arm's chosen cell whose config has a test.

    Raises ValueError where test was read and has been another one since.
    """
    found = []
    for name in (name for c in choices(workdir) if math.isfinite(c.valid) for name in c.members):
        folder = Path(workdir) / name
        test, file = sweep.test_of(sweep.config_of(folder)), folder / "test.json"
        if file.exists() and (old := read_json(file)["data"]) != test:
            raise ValueError(f"{file} was read of {old}, the recipe says {test} now; test is read once")
        if test["task"] or test["test"]:
            found.append(name)
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


def repeat(workdir: str | Path, seeds: Sequence[int]) -> None:
    """Add these seeds to what is chosen in a sweep whose members have all ended; what has one of them keeps it."""
    found = [c for c in choices(workdir) if math.isfinite(c.valid)]
    if not found:
        raise ValueError(
            f"{workdir}: no member has a score on valid, so none is chosen for more seeds; give config.data.valid"
        )
    for c in found:
        there = {sweep.seed_of(Path(workdir) / name) for name in c.members}
        if more := [seed for seed in seeds if seed not in there]:
            sweep.add_seeds(workdir, c.members[0], None if math.isnan(c.rate) else c.rate, more)


def choices(workdir: str | Path) -> list[Choice]:
    """Of each arm that the recipe has; none where nothing was scored on valid."""
    table = results.load(workdir)
    table = table[table.status.isin(sweep.ENDED) & table.name.isin(sweep.said(workdir)["members"])]
    return results.choose(table) if "valid" in table and table.valid.notna().any() else []


def next_rate(choice: Choice) -> float | None:
    """The rate that tells most of an arm: beyond the edge where the best one lies there, as far as the two at the edge
    are apart, else between the best and the better of its neighbours; three digits. None where there is none.
    """
    grid = [rate for rate in choice.rates if not math.isnan(rate)]
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
