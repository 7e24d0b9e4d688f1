"""The figures of a report: what is drawn, as a table, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from peftax import results
from peftax.results import RATE, SEED, Choice, label

BAND = 0.2  # how dark the range over seeds is
SPREAD = 5  # where one loss is more times another, their axis is logarithmic


def curves(table: pd.DataFrame, choices: Sequence[Choice]) -> pd.DataFrame | None:
    """Loss on valid over steps at each arm's chosen rate: the mean over seeds, and their range."""
    rows = []
    for c in choices:
        for name in c.members:
            folder = Path(table.set_index("name").loc[name, "folder"])
            for line in results.metrics(folder):
                if line.get("valid_nll") is not None:
                    where = {"arm": label(c.arm), "member": name, "step": line["step"]}
                    rows.append({**where, "valid": line["valid_nll"]})
    return pd.DataFrame(rows)


def draw_curves(data: pd.DataFrame):
    figure, axes = _axes("step", "loss on valid")
    for i, (arm, rows) in enumerate(data.groupby("arm", sort=False)):
        by_step = rows.groupby("step").valid
        axes.plot(by_step.mean().index, by_step.mean(), **_look(i), label=arm)
        axes.fill_between(by_step.min().index, by_step.min(), by_step.max(), color=_look(i)["color"], alpha=BAND)
    _scale_losses(axes, data.valid)
    _legend(axes)
    return figure


def rates(table: pd.DataFrame, choices: Sequence[Choice]) -> pd.DataFrame | None:
    """Loss on valid over the learning rate, a line for each arm."""
    rows = [
        {"arm": label(c.arm), "learning rate": rate, "valid": valid}
        for c in choices
        for rate, valid in c.rates.items()
        if len(c.rates) > 1 and math.isfinite(valid)
    ]
    return pd.DataFrame(rows)


def draw_rates(data: pd.DataFrame):
    figure, axes = _axes("learning rate", "loss on valid")
    for i, (arm, rows) in enumerate(data.groupby("arm", sort=False)):
        axes.plot(rows["learning rate"], rows["valid"], marker="o", **_look(i), label=arm)
        best = rows.loc[rows["valid"].idxmin()]
        axes.plot(best["learning rate"], best["valid"], marker="*", markersize=13, **_look(i))
    axes.set_xscale("log")
    _scale_losses(axes, data.valid)
    _legend(axes)
    return figure


def sizes(table: pd.DataFrame, choices: Sequence[Choice]) -> pd.DataFrame | None:
    """Loss on valid at the chosen rate over the number of trained numbers."""
    if "trainable" not in table or len(choices) < 2:
        return None
    by_name = table.set_index("name")
    rows = [
        {
            "arm": label(c.arm),
            "trainable": by_name.loc[c.members, "trainable"].mean(),
            "valid": c.valid,
            "low": min(c.seeds),
            "high": max(c.seeds),
        }
        for c in choices
    ]
    return pd.DataFrame(rows)


def draw_sizes(data: pd.DataFrame):
    figure, axes = _axes("trained numbers", "loss on valid")
    for i, row in enumerate(data.itertuples()):
        reach = [[row.valid - row.low], [row.high - row.valid]]
        mark = "os^"[i // 10 % 3]
        axes.errorbar(row.trainable, row.valid, yerr=reach, fmt=mark, color=_look(i)["color"], label=row.arm)
    axes.set_xscale("log")
    _scale_losses(axes, data.valid)
    _legend(axes)
    return figure


def heat(table: pd.DataFrame, choices: Sequence[Choice]) -> pd.DataFrame | None:
    """Loss on valid over rank and learning rate, a field for each method of several ranks."""
    rank, table = "method.rank", table[table.status == "finished"]
    if rank not in table or RATE not in table or table[rank].nunique() < 2 or table[RATE].nunique() < 2:
        return None
    keys = [k for k in results.swept(table) if k not in (rank, RATE, SEED)]
    rows = []
    for values, own in table.groupby(keys, dropna=False, sort=False) if keys else [((), table)]:
        if own[rank].nunique() < 2:
            continue
        means = own.groupby([rank, RATE]).valid.mean()
        arm = label(dict(zip(keys, values, strict=True)))
        rows += [{"arm": arm, "rank": r, "learning rate": x, "valid": v} for (r, x), v in means.items()]
    return pd.DataFrame(rows)


def draw_heat(data: pd.DataFrame, rows: str = "rank"):
    from matplotlib import pyplot

    arms = list(dict.fromkeys(data.arm))
    figure, fields = pyplot.subplots(
        1, len(arms), figsize=(4 * len(arms) + 1, 3.4), layout="constrained", squeeze=False
    )
    low, high = data.valid.min(), data.valid.quantile(0.9)
    for axes, arm in zip(fields[0], arms, strict=True):
        grid = data[data.arm == arm].pivot(index=rows, columns="learning rate", values="valid")
        image = axes.imshow(grid.values, aspect="auto", origin="lower", vmin=low, vmax=high, cmap="viridis_r")
        axes.set_xticks(range(len(grid.columns)), [f"{x:g}" for x in grid.columns], rotation=45)
        axes.set_yticks(range(len(grid.index)), [f"{x:g}" for x in grid.index])
        axes.set(xlabel="learning rate", ylabel=rows, title=arm)
        for (i, j), value in np.ndenumerate(grid.values):
            if np.isfinite(value):
                color = "white" if value > (low + high) / 2 else "black"  # on what is dark
                axes.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=fields, label="loss on valid")
    return figure


def costs(table: pd.DataFrame, choices: Sequence[Choice]) -> pd.DataFrame | None:
    """Seconds and memory of a run at each arm's chosen rate."""
    if "seconds" not in table or not choices:
        return None
    by_name = table.set_index("name")
    rows = []
    for c in choices:
        own = by_name.loc[c.members]
        rows.append({"arm": label(c.arm), "seconds": own.seconds.mean(), "peak GiB": own.peak_bytes.mean() / 2**30})
    return pd.DataFrame(rows)


def draw_costs(data: pd.DataFrame):
    from matplotlib import pyplot

    figure, fields = pyplot.subplots(1, 2, figsize=(8, 0.35 * len(data) + 1.4), layout="constrained", sharey=True)
    for axes, column in zip(fields, ("seconds", "peak GiB"), strict=True):
        axes.barh(data.arm, data[column], color="C0")
        axes.set_xlabel(column)
    fields[0].invert_yaxis()
    return figure


def forgetting(table: pd.DataFrame, choices: Sequence[Choice]) -> pd.DataFrame | None:
    """What training did to the loss on other data, against the score that it was done for: test, else valid."""
    names = [c.removeprefix("metrics.") for c in table if str(c).startswith("metrics.") and f"{c} before" in table]
    if not names or not choices:
        return None
    by_name, score = table.set_index("name"), "test" if any(c.read for c in choices) else "valid"
    rows = []
    for c in choices:
        own = by_name.loc[c.members]
        for name in names:
            before, after = own[f"metrics.{name} before"].mean(), own[f"metrics.{name}"].mean()
            where = {"arm": label(c.arm), "score": score, "loss": own[score].mean(), "data": name}
            rows.append({**where, "before": before, "after": after, "change": after - before})
    return pd.DataFrame(rows)


def draw_forgetting(data: pd.DataFrame):
    figure, axes = _axes(f"loss on {data.score[0]}", "change of the loss on other data")
    marks = dict(zip(dict.fromkeys(data.data), "os^Dv*" * len(data), strict=False))
    for i, (arm, rows) in enumerate(data.groupby("arm", sort=False)):
        for row in rows.itertuples():
            axes.plot(row.loss, row.change, marks[row.data], color=f"C{i % 10}", label=f"{arm}: {row.data}")
    axes.axhline(0, color="gray", linewidth=0.8)
    _legend(axes)
    return figure


FIGURES = (
    ("rates", "Learning rates", rates, draw_rates),
    ("curves", "Learning curves at the chosen rates", curves, draw_curves),
    ("sizes", "Loss and trained numbers", sizes, draw_sizes),
    ("rank_and_rate", "Rank and learning rate", heat, draw_heat),
    ("forgetting", "Forgetting", forgetting, draw_forgetting),
    ("costs", "Time and memory", costs, draw_costs),
)


def _axes(x: str, y: str):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


def _scale_losses(axes, losses: pd.Series) -> None:
    """Far losses (a random start, a rate too high) leave the near ones room to be told apart."""
    from matplotlib import ticker

    if 0 < SPREAD * losses.min() < losses.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _look(i: int) -> dict[str, str]:
    """Of the i-th arm's line: ten colours, solid, then dashed, then dotted."""
    return {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}


def _legend(axes) -> None:
    many = len(axes.get_legend_handles_labels()[1]) > 8  # would lie on the lines
    where = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if many else {}
    axes.legend(fontsize=7, **where)


def close(figure) -> None:
    from matplotlib import pyplot

    pyplot.close(figure)
