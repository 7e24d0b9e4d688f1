"""Does LoRA learn as much as full fine-tuning, and at which learning rates?

  python -m experiments.lora_without_regret classifier --workdir=runs/lora_without_regret
  python -m experiments.lora_without_regret language --workdir=runs/lora_without_regret

Grids grow until each arm's best rate lies inside, what is chosen gets two more seeds, then test is read of it. Writes
NAME.md, NAME.csv, NAME_rates.png and NAME_rates.csv into --into (by default beside this file); what is finished in the
workdir is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from absl import logging

from experiments.lora_without_regret import classifier, language
from experiments.lora_without_regret.arms import FACTOR, RANK, SEEDS
from experiments.sweeps import rates_of, require_finished
from peftax import report, results, selection
from peftax.report import figures
from peftax.results import Choice

HERE = Path(__file__).parent
SWEEPS = {"classifier": classifier, "language": language}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=SWEEPS)
    parser.add_argument("--workdir", type=Path, default=Path("runs/lora_without_regret"))
    parser.add_argument("--into", type=Path, default=HERE)
    parser.add_argument("--jobs", type=int, default=1, help="programs at one time, each on cores of its own")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.WARNING)
    sweep = SWEEPS[args.name]
    how = {"together": sweep.TOGETHER, "jobs": args.jobs}
    require_finished(selection.run(sweep.__file__, args.workdir / args.name, seeds=SEEDS, **how))
    args.into.mkdir(parents=True, exist_ok=True)
    print(write(args.name, results.load(args.workdir / args.name), args.into))


@dataclasses.dataclass(frozen=True)
class Arm:
    """A choice, and test of its seeds in their order."""

    choice: Choice
    test: list[float]

    @property
    def best(self) -> float:
        """Where the parabola through the best rate and its neighbours has its lowest point, over log(rate)."""
        grid = {math.log(rate): loss for rate, loss in self.choice.rates.items() if math.isfinite(loss)}
        at = sorted(grid)
        middle = at.index(math.log(self.choice.rate))
        if not 0 < middle < len(at) - 1:
            return self.choice.rate
        near = at[middle - 1 : middle + 2]
        a, b, _ = np.polyfit(near, [grid[x] for x in near], 2)
        return math.exp(-b / (2 * a))


def name_of(arm: dict, sweep) -> str:
    """ "rank 16", "attention, rank 20", "full, batches of 16"."""
    places = {sweep.ATTENTION: "attention", sweep.MLP: "mlp"}
    rank = f"rank {arm['method.rank']:g}" if "method.rank" in arm else "full"
    where = f"{places[arm['method.targets']]}, " if "method.targets" in arm else ""
    rows = f", batches of {arm['train.batch_size']:g}" if "train.batch_size" in arm else ""
    return where + rank + rows


def write(name: str, table: pd.DataFrame, into: Path) -> str:
    """The report of a finished sweep."""
    sweep = SWEEPS[name]
    by_name = table.set_index("name")
    arms = {}
    for c in results.choose(table):
        own = by_name.loc[c.members].sort_values("seed", na_position="first")
        arms[name_of(c.arm, sweep)] = Arm(dataclasses.replace(c, members=list(own.index)), own.test.tolist())
    rows = [
        {
            "arm": label,
            "trainable": int(by_name.loc[arm.choice.members, "trainable"].iloc[0]),
            "chosen rate": arm.choice.rate,
            "in its grid": report.WHERE[arm.choice.edge],
            "best rate, between": float(f"{arm.best:.2g}"),
            "trials": arm.choice.trials,
            "valid": arm.choice.valid,
            "test": float(np.mean(arm.test)),
            "± (seeds)": report.spread(arm.test),
        }
        for label, arm in arms.items()
    ]
    found = pd.DataFrame(rows)
    found.to_csv(into / f"{name}.csv", index=False)
    rates = rates_of({label: arm.choice for label, arm in arms.items()})
    rates.to_csv(into / f"{name}_rates.csv", index=False)
    matplotlib.use("Agg")
    figure = figures.draw_rates(rates)
    figure.savefig(into / f"{name}_rates.png", dpi=120)
    figures.close(figure)
    parts = [
        ("Claims", report.markdown(pd.DataFrame(claims(arms, sweep.ROWS)))),
        ("What was chosen on valid", report.markdown(found)),
        ("Loss on valid over learning rates", into / f"{name}_rates.png"),
    ]
    text = report.as_markdown(f"LoRA without regret, {name}, run", parts)
    (into / f"{name}.md").write_text(text)
    return text


def claims(arms: dict[str, Arm], rows: int) -> list[dict[str, str]]:
    """A row for each claim: theirs, ours, what that says."""
    ranks = {
        float(label.split()[1]): arm for label, arm in arms.items() if label.startswith("rank") and "," not in label
    }
    full, least, most = arms["full"], ranks[min(ranks)], ranks[max(ranks)]
    best = [arm.best for arm in ranks.values()]
    one = next(arm for label, arm in arms.items() if label.startswith("attention"))
    other = next(arm for label, arm in arms.items() if label.startswith("mlp"))
    found = [
        {
            "claim": "LoRA's best rate over full fine-tuning's",
            "theirs": "9.8",
            "ours": f"{np.exp(np.mean(np.log(best))) / full.best:.1f}",
            "verdict": "",
        },
        {
            "claim": f"best rates of ranks {min(ranks):g} to {max(ranks):g}, the highest over the lowest",
            "theirs": "about 1",
            "ours": f"{max(best) / min(best):.1f}",
            "verdict": "",
        },
        compared(f"rank {max(ranks):g} loses nothing to full fine-tuning", "0", full.test, most.test),
        compared(f"rank {max(ranks):g} is better than rank {min(ranks):g}", "< 0", least.test, most.test),
        compared("MLP layers alone are better than attention's, as many numbers", "< 0", one.test, other.test),
    ]
    sizes = [f"batches of {size}" for size in (rows // FACTOR, rows * FACTOR)]
    if f"full, {sizes[0]}" in arms:
        gaps = [np.subtract(arms[f"rank {RANK}, {size}"].test, arms[f"full, {size}"].test) for size in sizes]
        found.append(compared("LoRA loses more in large batches: its gap there less that in small ones", "> 0", *gaps))
    return found


def compared(claim: str, theirs: str, a: Sequence[float], b: Sequence[float]) -> dict[str, str]:
    """b - a on test, paired by seed."""
    gap = results.verdict(a, b)
    sign = "lower" if gap.high < 0 else "higher" if gap.low > 0 else f"not resolved; detectable {gap.detectable:.4f}"
    return {"claim": claim, "theirs": theirs, "ours": str(gap), "verdict": sign}


if __name__ == "__main__":
    main()
