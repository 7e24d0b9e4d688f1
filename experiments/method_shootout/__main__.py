"""Which method is best, at one learning rate for all and at each method's own?

  python -m experiments.method_shootout --workdir=runs/method_shootout [--stages native 100k 1M 5M best]

The methods of each size with one seed: grids grow until best rates lie inside. Then the best twelve of all with two
more seeds: test, and what they have forgotten of other English. A stage reads what those before it have written into
--into (by default beside this file): SIZE.csv, SIZE_rates.csv, best.csv; report.md, ranking.csv and PNG files are made
of all that is there. What is finished in the workdir is not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from absl import logging
from scipy import stats

from experiments.method_shootout.arms import FIXED, RATE, SIZES, settings
from experiments.method_shootout.seeds import SEEDS
from experiments.sweeps import rates_of, require_finished
from peftax import report, results, selection, sweep
from peftax.report import figures

HERE = Path(__file__).parent
RECIPES = {"native": "native.py", "100k": "of_100k.py", "1M": "of_1m.py", "5M": "of_5m.py"}
BEST = 12
OTHER = {"prose": "prose"}  # what may be forgotten
AT_FIXED = f"valid at {FIXED:g}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/method_shootout"))
    parser.add_argument("--into", type=Path, default=HERE)
    parser.add_argument("--stages", nargs="+", choices=(*SIZES, "best"), default=[*SIZES, "best"])
    parser.add_argument("--jobs", type=int, default=1, help="programs at one time, each on cores of its own")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.WARNING)
    matplotlib.use("Agg")
    args.into.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        if stage == "best":
            repeat(args.workdir / "seeds", args.into)
        else:
            of_size(stage, args.workdir / stage, args.into, args.jobs)
        print(write(args.into))


def of_size(size: str, workdir: Path, into: Path, jobs: int) -> None:
    """SIZE.csv: what was chosen for every method at a size; SIZE_rates.csv: the losses at its learning rates."""
    require_finished(selection.run(str(HERE / RECIPES[size]), workdir, together=4, jobs=jobs))
    table = results.load(workdir)
    by_name = table.set_index("name")
    choices = {c.arm["method.name"]: c for c in results.choose(table)}
    rows = [
        {
            "method": method,
            "size": size,
            "trainable": int(by_name.loc[c.members[0], "trainable"]),
            "own rate": c.rate,
            "in its grid": report.WHERE[c.edge],
            "trials": c.trials,
            "valid": c.valid,
            AT_FIXED: c.rates[FIXED],
            "test": by_name.loc[c.members[0], "test"],
        }
        for method, c in choices.items()
    ]
    pd.DataFrame(rows).sort_values("valid").to_csv(into / f"{size}.csv", index=False)
    rates_of(choices).to_csv(into / f"{size}_rates.csv", index=False)


def ranking_in(into: Path) -> pd.DataFrame:
    """The arms of all sizes whose SIZE.csv is there, the best on valid first, with their places."""
    found = [pd.read_csv(file) for size in SIZES if (file := into / f"{size}.csv").exists()]
    if not found:
        raise SystemExit(f"{into}: no size has been run; start with --stages {next(iter(SIZES))}")
    ranking = pd.concat(found).sort_values("valid", ignore_index=True)
    places = {"place": ranking.valid, f"place at {FIXED:g}": ranking[AT_FIXED]}
    return ranking.assign(**{name: losses.rank().astype(int) for name, losses in places.items()})


def repeat(workdir: Path, into: Path) -> None:
    """best.csv: the best arms with two more seeds; on test also against the one that is best on valid."""
    rows: list[dict[str, Any]] = []
    first: list[float] = []
    for arm in ranking_in(into).head(BEST).to_dict("records"):
        size, method = arm["size"], arm["method"]
        pairs = sweep.pairs({**settings(size, method), RATE: arm["own rate"]})
        seeds, folder = str(HERE / "seeds.py"), workdir / f"{size}-{method}"
        require_finished(selection.run(seeds, folder, pairs, measures=OTHER, together=2))
        others = results.load(folder).sort_values("seed")
        test = [arm["test"], *others.test]
        first = first or test
        row = {"method": method, "size": size, "test": np.mean(test), "± (seeds)": report.spread(test)}
        row["more than the first on valid [95%]"] = "" if test is first else str(results.verdict(first, test))
        row |= {f"test, seed {seed}": loss for seed, loss in zip((0, *SEEDS), test, strict=True)}
        for name in OTHER:
            change = others[f"metrics.{name}"] - others[f"metrics.{name} before"]
            row |= {f"{name}, change": change.mean(), f"± ({name})": report.spread(change)}
        rows.append(row)
    pd.DataFrame(rows).sort_values("test").to_csv(into / "best.csv", index=False)


def write(into: Path) -> str:
    """The report of the stages whose files are there."""
    ranking = ranking_in(into)
    ranking.to_csv(into / "ranking.csv", index=False)
    save(draw_places(ranking), into / "ranking.png")
    rho, low, high = correlation(ranking["place"], ranking[f"place at {FIXED:g}"])
    parts = [
        ("Places at one rate and at each arm's own", into / "ranking.png"),
        (
            "Do the two rankings agree?",
            f"Spearman's correlation over {len(ranking)} arms: {rho:.2f} [{low:.2f}, {high:.2f}], arms resampled.",
        ),
        ("All arms, one seed", report.markdown(ranking)),
    ]
    if (file := into / "best.csv").exists():
        best = pd.read_csv(file)
        save(draw_forgetting(best), into / "best.png")
        parts += [
            (f"The best {len(best)}, three seeds; other English with two", report.markdown(best)),
            ("Gain and forgetting", into / "best.png"),
        ]
    for size in SIZES:
        if (file := into / f"{size}_rates.csv").exists():
            save(figures.draw_rates(pd.read_csv(file)), file.with_suffix(".png"))
            parts.append((f"Loss on valid over learning rates, {size}", file.with_suffix(".png")))
    text = report.as_markdown("Methods side by side, run", parts)
    (into / "report.md").write_text(text)
    return text


def save(figure, file: Path) -> None:
    figure.savefig(file, dpi=120)
    figures.close(figure)


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
    axes.set(xlim=(-0.6, 1.6), ylabel="place by loss on valid", yticks=(1, *range(5, len(ranking) + 1, 5)))
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
