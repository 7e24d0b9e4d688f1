"""Parameter-efficient methods on a small encoder: do they reach full fine-tuning on sentences of movie reviews?

  python -m experiments.sentence_sentiment --workdir=runs/sentence_sentiment

Every learning rate is chosen on valid with seed 0, two more seeds train at it, and test is read once, by the three
runs of each arm. Writes report.md, accuracy.png, accuracy.csv, rates.png and rates.csv into --into (by default beside
this file); what is finished in the workdir is not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from absl import logging

from experiments.sentence_sentiment import config as sweeps
from experiments.sweeps import rates_of, require_finished
from peftax import report, results, selection, sweep
from peftax.report import figures
from peftax.results import Choice
from peftax.weights.source import read_json

HERE = Path(__file__).parent
SEEDS = (1, 2)  # beside 0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/sentence_sentiment"))
    parser.add_argument("--into", type=Path, default=HERE)
    parser.add_argument("--jobs", type=int, default=2, help="programs at one time, each on cores of its own")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.WARNING)
    how = {"together": 4, "jobs": args.jobs}
    require_finished(selection.run(str(HERE / "config.py"), args.workdir, seeds=SEEDS, **how))
    args.into.mkdir(parents=True, exist_ok=True)
    print(write(args.workdir, args.into))


def choices(workdir: Path, table: pd.DataFrame) -> dict[str, Choice]:
    """{arm: what was chosen of it}, in the recipe's order."""
    arms = {str(sweep.arm(sweep.pairs(values))): arm for arm, values in sweeps.members()}
    found = {arms[str(sweep.arm_of(workdir, c.members[0]))]: c for c in results.choose(table)}
    return {arm: found[arm] for arm in sweeps.ARMS}


def write(workdir: Path, into: Path) -> str:
    """The report of a finished sweep and its figures, each with its numbers."""
    table = results.load(workdir)
    chosen, by_name = choices(workdir, table), table.set_index("name")
    runs = {arm: by_name.loc[c.members].sort_values("seed", na_position="first") for arm, c in chosen.items()}
    errors = {arm: list(1 - own.test_accuracy) for arm, own in runs.items()}
    rows: list[dict[str, Any]] = []
    for arm, c in chosen.items():
        own, gap = runs[arm], results.verdict(errors["full"], errors[arm])
        rows.append(
            {
                "arm": arm,
                "trainable": int(own.trainable.iloc[0]),
                "learning rate": c.rate,
                "in its grid": report.WHERE[c.edge],
                "valid nll": c.valid,
                "test nll": own.test.mean(),
                "test accuracy, %": 100 * own.test_accuracy.mean(),
                "± (3 seeds)": 100 * own.test_accuracy.std(),
                "errors more than full, points [95%]": "" if arm == "full" else interval(gap),
            }
        )
    accuracy = pd.DataFrame(rows)
    accuracy.to_csv(into / "accuracy.csv", index=False)
    rates = rates_of(chosen)
    rates.to_csv(into / "rates.csv", index=False)
    for name, figure in (("rates", figures.draw_rates(rates)), ("accuracy", draw(accuracy))):
        figure.savefig(into / f"{name}.png", dpi=120)
        figures.close(figure)
    n = int(read_json(workdir / chosen["full"].members[0] / "test.json")["tokens"])
    shown = accuracy.round({"valid nll": 4, "test nll": 4, "test accuracy, %": 1, "± (3 seeds)": 1})
    parts = [
        (f"Accuracy on {n:,} test sentences", report.markdown(shown)),
        ("Accuracy against what trains", into / "accuracy.png"),
        ("Learning rates, valid", into / "rates.png"),
    ]
    text = report.as_markdown("Sentence sentiment, run", parts)
    (into / "report.md").write_text(text)
    return text


def interval(gap: results.Verdict) -> str:
    """In percentage points, paired by seed."""
    return f"{100 * gap.difference:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


def draw(table: pd.DataFrame):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for row in table.to_dict("records"):
        at = row["trainable"], row["test accuracy, %"]
        axes.errorbar(*at, yerr=row["± (3 seeds)"], fmt="o", capsize=3)
        axes.annotate(row["arm"], at, xytext=(6, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel="numbers that train", ylabel="test accuracy, %")
    return figure


if __name__ == "__main__":
    main()
