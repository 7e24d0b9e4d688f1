"""Which method is best, at one learning rate for all and at each method's own?

  python -m experiments.method_shootout --workdir=runs/method_shootout [--sizes native 100k 1M 5M]

First all methods with one seed, at every size: grids grow until best rates lie inside. Then the best twelve with two
more seeds: test, and what they have forgotten of other English. Writes report.md and CSV and PNG files into --into (by
default beside this file); what is finished in the workdir is not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from absl import logging
from scipy import stats

from experiments.method_shootout.arms import FIXED, RATE, SIZES, settings
from experiments.sweeps import require_finished
from peftax import report, results, selection, sweep
from peftax.report.figures import close
from peftax.results import Choice

HERE = Path(__file__).parent
RECIPES = {"native": "native.py", "100k": "of_100k.py", "1M": "of_1m.py", "5M": "of_5m.py"}
BEST = 12
OTHER = {"prose": "prose"}  # what may be forgotten


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/method_shootout"))
    parser.add_argument("--into", type=Path, default=HERE)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.WARNING)
    choices = {}
    for size in args.sizes:
        require_finished(selection.run(str(HERE / RECIPES[size]), args.workdir / size, together=4))
        for choice in results.choose(results.load(args.workdir / size)):
            choices[size, choice.arm["method.name"]] = choice
    best = sorted(choices, key=lambda at: choices[at].valid)[:BEST]
    for size, method in best:
        pairs = sweep.pairs({**settings(size, method), RATE: choices[size, method].rate})
        require_finished(
            selection.run(str(HERE / "seeds.py"), again(args.workdir, size, method), pairs, measures=OTHER)
        )
    args.into.mkdir(parents=True, exist_ok=True)
    repeated = {at: results.load(again(args.workdir, *at)) for at in best}
    print(write(choices, results.load(*(args.workdir / s for s in args.sizes)), repeated, args.into))


def again(workdir: Path, size: str, method: str) -> Path:
    """Where an arm's other seeds lie."""
    return workdir / "seeds" / f"{size}-{method}"


def write(
    choices: Mapping[tuple[str, str], Choice],
    table: pd.DataFrame,
    repeated: Mapping[tuple[str, str], pd.DataFrame],
    into: Path,
) -> str:
    """The report: ranking.csv of all arms with one seed, best.csv of the best with three."""
    by_name = table.drop_duplicates("name").set_index("name")
    ranking = pd.DataFrame(
        [
            {
                "method": method,
                "size": size,
                "trainable": int(by_name.loc[c.members[0], "trainable"]),
                "own rate": c.rate,
                "in its grid": report.WHERE[c.edge],
                "trials": c.trials,
                "valid": c.valid,
                f"valid at {FIXED:g}": c.rates[FIXED],
            }
            for (size, method), c in choices.items()
        ]
    ).sort_values("valid", ignore_index=True)
    ranking["place"] = ranking.valid.rank().astype(int)
    ranking[f"place at {FIXED:g}"] = ranking[f"valid at {FIXED:g}"].rank().astype(int)
    ranking.to_csv(into / "ranking.csv", index=False)
    rho, low, high = correlation(ranking["place"], ranking[f"place at {FIXED:g}"])
    rows: list[dict[str, Any]] = []
    for (size, method), others in repeated.items():
        first = by_name.loc[choices[size, method].members[0]]
        test = [first.test, *others.sort_values("seed").test]
        row = {"method": method, "size": size, "test": np.mean(test), "± (seeds)": report.spread(test)}
        for name in OTHER:
            change = others[f"metrics.{name}"] - others[f"metrics.{name} before"]
            row |= {f"{name}, change": change.mean(), f"± ({name})": report.spread(change)}
        rows.append(row)
    best = pd.DataFrame(rows).sort_values("test", ignore_index=True)
    best.to_csv(into / "best.csv", index=False)
    matplotlib.use("Agg")
    for name, figure in (("ranking", draw_places(ranking)), ("best", draw_forgetting(best))):
        figure.savefig(into / f"{name}.png", dpi=120)
        close(figure)
    parts = [
        ("Places at one rate and at each arm's own", into / "ranking.png"),
        (
            "Do the two rankings agree?",
            f"Spearman's correlation over {len(ranking)} arms: {rho:.2f} [{low:.2f}, {high:.2f}], arms resampled.",
        ),
        ("All arms, one seed", report.markdown(ranking)),
        (f"The best {len(best)}, three seeds; other English with two", report.markdown(best)),
        ("Gain and forgetting", into / "best.png"),
    ]
    text = report.as_markdown("Methods side by side, run", parts)
    (into / "report.md").write_text(text)
    return text


def correlation(a: pd.Series, b: pd.Series, draws: int = 2000) -> tuple[float, float, float]:
    """Spearman's, and its 95% interval."""
    rng = np.random.default_rng(0)
    rows = np.stack([a, b])
    found = []
    for _ in range(draws):
        one, other = rows[:, rng.integers(0, len(a), len(a))]
        if len(set(one)) > 1 and len(set(other)) > 1:
            found.append(stats.spearmanr(one, other).statistic)
    return (float(stats.spearmanr(a, b).statistic), *map(float, np.quantile(found, (0.025, 0.975))))


def draw_places(ranking: pd.DataFrame):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 0.19 * len(ranking) + 1), layout="constrained")
    for i, row in enumerate(ranking.to_dict("records")):
        left, right = row[f"place at {FIXED:g}"], row["place"]
        axes.plot((0, 1), (left, right), marker=".", color=f"C{i % 10}", linewidth=1)
        axes.text(1.03, right, f"{row['method']}, {row['size']}", va="center", fontsize=7)
        axes.text(-0.03, left, f"{row['method']}, {row['size']}", va="center", ha="right", fontsize=7)
    axes.set_xticks((0, 1), (f"{FIXED:g} for all", "each its own"))
    axes.set(xlim=(-0.6, 1.6), ylabel="place by loss on valid")
    axes.invert_yaxis()
    return figure


def draw_forgetting(best: pd.DataFrame):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for row in best.to_dict("records"):
        at = row["test"], row["prose, change"]
        axes.plot(*at, "o", color="C0")
        axes.annotate(f"{row['method']}, {row['size']}", at, xytext=(5, 3), textcoords="offset points", fontsize=7)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set(xlabel="loss on test", ylabel="change of the loss on other English")
    return figure


if __name__ == "__main__":
    main()
