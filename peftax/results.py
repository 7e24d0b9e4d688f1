"""What sweeps and runs came to: one tidy table, and choices that a reader can trust.

A learning rate is chosen on valid, for every arm (all that is swept but the learning rate and the seed) by itself, by
the seeds that all its rates have.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from scipy import stats

from peftax import recipe, sweep

RATE = sweep.RATE
SEED = "seed"


def load(*folders: str | Path) -> pd.DataFrame:
    """A row for each run in these folders, of a sweep for each member: name, status, swept keys, results.

    Keys are as in the config ("method.rank"); "seed" is what a sweep calls a run's seeds; "test" is there where it was
    read; "metrics.NAME" is what else was measured, "metrics.NAME before" of the untouched base. What a run does not
    have is missing (NaN).

    Raises FileNotFoundError where a folder holds no run.
    """
    rows = []
    for folder in map(Path, folders):
        runs = sorted(f.parent for f in folder.glob("*/member.json")) or [folder]
        if not any((runs[0] / name).exists() for name in ("member.json", "config.json")):
            raise FileNotFoundError(f"{folder}: holds neither a run nor a sweep")
        rows += [_row(run) for run in runs]
    return pd.DataFrame(rows)


def _row(run: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"name": run.name, "folder": str(run), "status": sweep.status(run)}
    if (file := run / "member.json").exists():
        overrides = dict(json.loads(file.read_text())["overrides"])
        row |= {key: _value(value) for key, value in overrides.items() if key not in sweep.SEEDS}
        if seeds := {key: value for key, value in overrides.items() if key in sweep.SEEDS}:
            row[SEED] = _seed(seeds)
    lines = metrics(run)
    if lines:
        row["step"] = lines[-1]["step"]
        losses = [x["loss"] for x in lines if x.get("loss") is not None]
        row["loss"] = losses[-1] if losses else math.nan
        nlls = [x["valid_nll"] for x in lines if x.get("valid_nll") is not None]
        row["valid"] = min(nlls) if nlls else math.nan
    if (file := run / "result.json").exists():
        result = json.loads(file.read_text())
        row |= {k: v for k, v in result.items() if not isinstance(v, list | dict)}
        if result.get("best"):
            row["best_step"], row["valid"] = result["best"]
    if (file := run / "test.json").exists():
        test = json.loads(file.read_text())
        row |= {"test": test["nll"]} | ({"test_accuracy": test["accuracy"]} if "accuracy" in test else {})
    if (file := run / "metrics.json").exists():
        base = sweep.base_file(run)
        before = json.loads(base.read_text()) if base.exists() else {}
        for name, value in json.loads(file.read_text()).items():
            row |= {f"metrics.{name}": value, f"metrics.{name} before": before.get(name, math.nan)}
    return row


def metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _value(text: str) -> Any:
    """A swept value; lists and dicts stay text, by which rows can be grouped."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, list | dict) else value


def _seed(own: dict[str, str]) -> Any:
    """The seed of a run, or where its seeds are not one, what they are."""
    if len(own) == len(sweep.SEEDS) and len(set(own.values())) == 1:
        return _value(own[sweep.SEEDS[0]])
    return ",".join(f"{key}={value}" for key, value in sorted(own.items()))


def swept(table: pd.DataFrame) -> list[str]:
    """The swept keys of a table: those of configs, and the seed."""
    return [c for c in table.columns if c == SEED or ("." in c and not c.startswith("metrics."))]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for one arm.

    arm:    {key: value}, all that is swept but the learning rate and the seed.
    rate:   the learning rate whose mean on valid is best, over the seeds that all rates have.
    valid:  its mean over all seeds that it has; `seeds` are the single values.
    rates:  the arm's grid, rising, with the mean of each (inf where a member failed or ended with no number), over the
            seeds that all have.
    edge:   "low" | "high" where the choice is at the grid's end, "" inside, "only" where there is one rate (NaN where
            it is not swept), "none" where no member ever had a number.
    trials: members of the arm by which it was chosen.
    read:   of the arm's rates, for how many test has been read.
    """

    arm: dict[str, Any]
    rate: float
    valid: float
    seeds: list[float]
    rates: dict[float, float]
    edge: str
    trials: int
    members: list[str]
    read: int = 0


def label(arm: dict[str, Any]) -> str:
    """ "lora, rank 8"."""
    arm = {key: value for key, value in arm.items() if not pd.isna(value)}
    words = [str(arm["method.name"])] if "method.name" in arm else []
    short = sweep.short_names(arm.keys())
    words += [f"{short[key]} {_short(value)}" for key, value in arm.items() if key != "method.name"]
    return ", ".join(words) or "all"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def choose(table: pd.DataFrame, *, over: str = RATE, metric: str = "valid") -> list[Choice]:
    """For every arm the value of `over` whose mean of `metric` (the lower the better) over seeds is best.

    Raises ValueError where a table has no such metric, or an arm is not finished: a choice among some is none.
    """
    if metric not in table:
        raise ValueError(f"results: there is no column {metric!r}; there are {', '.join(map(str, table.columns))}")
    if not (open_ := table[~table.status.isin(sweep.ENDED)]).empty:
        raise ValueError(f"results: {len(open_)} members are not finished, {open_.name.iloc[0]!r} first")
    keys = [k for k in swept(table) if k not in (over, SEED)]
    found = []
    for values, rows in table.groupby(keys, dropna=False, sort=False) if keys else [((), table)]:
        arm = {k: v for k, v in zip(keys, values, strict=True) if not (isinstance(v, float) and math.isnan(v))}
        scores = rows[metric].where(rows.status == "finished").fillna(math.inf)
        at = rows[over] if over in rows else pd.Series(math.nan, rows.index)
        of_all = _seeds_of_all(rows, at)
        means = scores[of_all].groupby(at[of_all], dropna=False).mean().sort_index()
        rate = means.index[int(np.argmin(means.to_numpy()))]
        chosen = rows[at.isna() if pd.isna(rate) else at == rate]
        if SEED in rows:  # as in every arm, so that they can be paired
            chosen = chosen.sort_values(SEED, kind="stable", key=lambda seeds: seeds.map(_order))
        grid = means.index.dropna()
        edge = "low" if rate == grid.min() else "high" if rate == grid.max() else ""
        edge = "only" if pd.isna(rate) or len(grid) == 1 else edge
        edge = "none" if rows[metric].isna().all() else edge
        found.append(
            Choice(
                arm=arm,
                rate=float(rate),
                valid=float(scores[chosen.index].mean()),
                seeds=[float(v) for v in scores[chosen.index]],
                rates={float(k): float(v) for k, v in means.items()},
                edge=edge,
                trials=int(of_all.sum()),
                members=list(chosen.name),
                read=at[rows.test.notna()].nunique(dropna=False) if "test" in rows else 0,
            )
        )
    return found


def _order(seed: Any) -> tuple[bool, Any]:
    """Numbers first, then what is said in words."""
    return isinstance(seed, str), -1 if pd.isna(seed) else seed


def _seeds_of_all(rows: pd.DataFrame, at: pd.Series) -> pd.Series:
    """Which rows have a seed that all values of `at` have; all where there is none such."""
    everywhere = pd.Series(True, rows.index)
    if SEED not in rows:
        return everywhere
    seeds = rows[SEED].fillna(-1)  # of a recipe that sweeps none
    shared = set.intersection(*(set(own) for _, own in seeds.groupby(at, dropna=False)))
    return seeds.isin(shared) if shared else everywhere


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether `b` is lower than `a` (a claim), from paired or unpaired seeds.

    difference: mean of b - a, with its 95% interval (t); detectable: the least that these runs would have found four
    times in five.
    """

    said: str
    difference: float
    low: float
    high: float
    detectable: float

    def __str__(self) -> str:
        return f"{self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def verdict(a: Sequence[float], b: Sequence[float], *, paired: bool = True) -> Verdict:
    """ "supported" where the interval of b - a lies below 0, "contradicted" where above, else "not resolved"."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(len(a), len(b)) < 2 or (paired and len(a) != len(b)):
        raise ValueError(
            f"verdict: {len(a)} and {len(b)} runs do not make a comparison; want two at least, of the same seeds"
        )
    if paired:
        d = b - a
        mean, error, free = d.mean(), d.std(ddof=1) / math.sqrt(len(d)), len(d) - 1
    else:  # Welch
        va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
        mean, error = b.mean() - a.mean(), math.sqrt(va + vb)
        parts = va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)
        free = (va + vb) ** 2 / parts if parts else len(a) + len(b) - 2
    half = error * stats.t.ppf(0.975, free)
    said = "supported" if mean + half < 0 else "contradicted" if mean - half > 0 else "not resolved"
    detectable = error * (stats.t.ppf(0.975, free) + stats.t.ppf(0.8, free))
    return Verdict(said, float(mean), float(mean - half), float(mean + half), float(detectable))


def differences(one: Path, other: Path) -> dict[str, tuple[Any, Any]]:
    """{key: (value in one run, in the other)}, of configs, of versions and of results, where they are not the same."""
    found = {}
    for name in ("config.json", "environment.json", "result.json"):
        a, b = (recipe.flat(json.loads(f.read_text())) if f.exists() else {} for f in (one / name, other / name))
        if name == "config.json" and not (a and b):
            missing = one if not a else other
            raise FileNotFoundError(f"{missing}: holds no run")
        prefix = {"config.json": "config.", "environment.json": "environment.", "result.json": ""}[name]
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key) and key != "started":
                found[prefix + key] = (a.get(key), b.get(key))
    return found


def show(table: pd.DataFrame, console: Console) -> None:
    """A line a run."""
    shown = Table()
    columns = [c for c in ("step", "loss", "valid", "seconds") if c in table]
    shown.add_column("run")
    shown.add_column("status")
    for column in columns:
        shown.add_column(column, justify="right")
    for row in table.to_dict("records"):
        cells = [
            "" if pd.isna(row[c]) else f"{row[c]:.0f}" if c in ("step", "seconds") else f"{row[c]:.4f}" for c in columns
        ]
        shown.add_row(row["name"], row["status"], *cells)
    console.print(shown)
