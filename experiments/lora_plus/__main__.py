"""Is LoRA better where B learns faster than A? Loss over A's learning rate and the ratio of B's to it.

  python -m experiments.lora_plus --workdir=runs/lora_plus

Grids grow until each ratio's best rate lies inside, what is chosen gets two more seeds, then test is read of it. Writes
report.md, cells.csv, cells.png and ratios.csv into --into (by default beside this file); what is finished in the
workdir is not run again.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from absl import logging

from experiments.lora_plus.config import MORE, RATIO
from experiments.sweeps import rates_of, require_finished
from peftax import report, results, selection
from peftax.report import figures

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/lora_plus"))
    parser.add_argument("--into", type=Path, default=HERE)
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.WARNING)
    require_finished(selection.run(str(HERE / "config.py"), args.workdir, seeds=MORE, together=16))
    args.into.mkdir(parents=True, exist_ok=True)
    print(write(results.load(args.workdir), args.into))


def write(table: pd.DataFrame, into: Path) -> str:
    """The report, from a finished sweep; cells.csv has a row for each cell, ratios.csv for each ratio."""
    choices = {ratio(c.arm[RATIO]): c for c in sorted(results.choose(table), key=lambda c: ratio(c.arm[RATIO]))}
    cells = rates_of(choices).rename(columns={"arm": "ratio"})
    cells.to_csv(into / "cells.csv", index=False)
    matplotlib.use("Agg")
    figure = figures.draw_heat(cells.assign(arm=""), rows="ratio")
    figure.savefig(into / "cells.png", dpi=120)
    figures.close(figure)
    test = {at: table[table.name.isin(c.members)].sort_values("seed").test.tolist() for at, c in choices.items()}
    rows = []
    for at, c in choices.items():
        row = {"ratio": at, "A's rate": c.rate, "B's rate": at * c.rate, "in its grid": report.WHERE[c.edge]}
        row |= {"trials": c.trials, "valid": c.valid, "test": sum(test[at]) / len(test[at])}
        rows.append(row | {"test minus LoRA's [95%]; is it lower?": "" if at == 1 else interval(test[1.0], test[at])})
    ratios = pd.DataFrame(rows)
    ratios.to_csv(into / "ratios.csv", index=False)
    parts = [
        ("Loss on valid, means of seeds", into / "cells.png"),
        ("What was chosen on valid for each ratio", report.markdown(ratios)),
    ]
    text = report.as_markdown("Learning rates of A and of B, run", parts)
    (into / "report.md").write_text(text)
    return text


def ratio(factors: str) -> float:
    """B's to A's, of `optimizer.factors` as a table of results has it."""
    ((_, found),) = ast.literal_eval(factors)
    return float(found)


def interval(lora: Sequence[float], other: Sequence[float]) -> str:
    gap = results.verdict(lora, other)
    return f"{gap}, {gap.said}"


if __name__ == "__main__":
    main()
