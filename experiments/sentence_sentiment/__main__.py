"""Parameter-efficient methods on a small encoder: do they reach full fine-tuning on sentences of movie reviews?

  python -m experiments.sentence_sentiment --workdir=runs/sentence_sentiment

Every learning rate is chosen on valid with seed 0, two more seeds train at it, and test is read once, by the three
runs of each arm. Writes report.md, accuracy.png, accuracy.csv, rates.png and rates.csv into the workdir; what is
finished is not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from absl import logging

from experiments.sentence_sentiment import config as sweeps
from experiments.sentence_sentiment.seeds import SEEDS
from experiments.sweeps import require_finished
from peftax import report, results, sweep
from peftax.report import figures
from peftax.results import RATE, Choice
from peftax.train import readings
from peftax.weights.source import write_json

HERE = Path(__file__).parent
TEST = "test.json"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", default="runs/sentence_sentiment")
    workdir = Path(parser.parse_args(argv).workdir)
    logging.set_verbosity(logging.WARNING)
    choices = choose(workdir)
    runs = {arm: repeated(arm, choice, workdir) for arm, choice in choices.items()}
    write(workdir, choices, runs, tested(runs, workdir))
    print(workdir / "report.md")


def choose(workdir: Path) -> dict[str, Choice]:
    """{arm: its learning rate, chosen on valid}."""
    grid = workdir / "grid"
    require_finished(sweep.run(str(HERE / "config.py"), grid))
    arms = dict(zip(sweep.members(str(HERE / "config.py")), (arm for arm, _ in sweeps.members()), strict=True))
    chosen = {arms[choice.members[0]]: choice for choice in results.choose(results.load(grid))}
    return {arm: chosen[arm] for arm in sweeps.ARMS}


def repeated(arm: str, choice: Choice, workdir: Path) -> list[Path]:
    """The folders of an arm's three seeds at its chosen learning rate."""
    settings = next(values for name, values in sweeps.members() if name == arm and values[RATE] == choice.rate)
    folder = workdir / "seeds" / arm
    require_finished(sweep.run(str(HERE / "seeds.py"), folder, sweep.pairs(settings)))
    return [workdir / "grid" / choice.members[0], *(folder / f"seed={seed}" for seed in SEEDS)]


def tested(runs: Mapping[str, Sequence[Path]], workdir: Path) -> dict[str, list[dict[str, float]]]:
    """{arm: nll and accuracy on test of each seed}; asked once, and kept."""
    file = workdir / TEST
    if file.exists():
        return json.loads(file.read_text())
    reader = readings.Reader(sweeps.get_config().to_dict())
    found = {arm: [reader.test(folder / "adapter") for folder in folders] for arm, folders in runs.items()}
    write_json(file, found)
    return found


def write(workdir: Path, choices: Mapping[str, Choice], runs: Mapping[str, Sequence[Path]], test: Any) -> None:
    """The report and its figures, each with its numbers."""
    full = [1 - x["accuracy"] for x in test["full"]]
    rows: list[dict[str, Any]] = []
    for arm, choice in choices.items():
        said = [json.loads((folder / "result.json").read_text()) for folder in runs[arm]]
        accuracy = [100 * x["accuracy"] for x in test[arm]]
        gap = results.verdict(full, [1 - x["accuracy"] for x in test[arm]])
        rows.append(
            {
                "arm": arm,
                "trainable": said[0]["trainable"],
                "learning rate": choice.rate,
                "in its grid": report.WHERE[choice.edge],
                "valid nll": np.mean([x["best"][1] for x in said]),
                "test nll": np.mean([x["nll"] for x in test[arm]]),
                "test accuracy, %": np.mean(accuracy),
                "± (3 seeds)": np.std(accuracy, ddof=1),
                "errors more than full, points [95%]": "" if arm == "full" else interval(gap),
            }
        )
    table = pd.DataFrame(rows)
    table.to_csv(workdir / "accuracy.csv", index=False)
    rates = pd.DataFrame(
        [
            {"arm": arm, "learning rate": rate, "valid": valid}
            for arm, c in choices.items()
            for rate, valid in c.rates.items()
        ]
    )
    rates.to_csv(workdir / "rates.csv", index=False)
    for name, figure in (("rates", figures.draw_rates(rates)), ("accuracy", draw(table))):
        figure.savefig(workdir / f"{name}.png", dpi=120)
        figures.close(figure)
    n = int(test["full"][0]["tokens"])
    shown = table.round({"valid nll": 4, "test nll": 4, "test accuracy, %": 1, "± (3 seeds)": 1})
    parts = [
        (f"Accuracy on {n:,} test sentences", report.markdown(shown)),
        ("Accuracy against what trains", workdir / "accuracy.png"),
        ("Learning rates, valid", workdir / "rates.png"),
    ]
    (workdir / "report.md").write_text(report.as_markdown("Sentence sentiment, run", parts))


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
