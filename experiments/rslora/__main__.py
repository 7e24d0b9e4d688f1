"""What a rank does to LoRA's gradient and first step, with alpha / rank and with alpha / sqrt(rank).

  python -m experiments.rslora [--ranks=1,4,16,64,256 --seeds=3 --rows=1 --length=256]

SmolLM2-135M-Instruct, LoRA on all linear layers, batches of the function-calling task. Writes slopes.csv, slopes.png
and report.md into --into (by default beside this file).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax import recipe
from peftax.core import tree
from peftax.train import loss, setup

HERE = Path(__file__).parent
RECIPE = "smollm2_lora"
ALPHA = 16.0
STEP = 1e-5  # of Adam's first step: so small that the loss is straight there
SCALES = {"alpha / rank": False, "alpha / sqrt(rank)": True}
FIGURES = {  # column: (what it is, the slope with alpha / rank, with alpha / sqrt(rank))
    "gradient": ("norm of the gradient by B, at B = 0", -0.5, 0.0),
    "step": ("fall of the loss by Adam's first step", 0.0, 0.5),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--into", type=Path, default=HERE)
    parser.add_argument("--ranks", default="1,4,16,64,256")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args(argv)
    rows = list(measure(list(map(int, args.ranks.split(","))), args.seeds, args.rows, args.length))
    args.into.mkdir(parents=True, exist_ok=True)
    with (args.into / "slopes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args.into / "slopes.png")
    text = report(rows, args)
    (args.into / "report.md").write_text(text)
    print(text)


def measure(ranks: Sequence[int], seeds: int, rows: int, length: int) -> Iterator[dict[str, Any]]:
    """A row for each scale, rank and seed (of A, and of the batch)."""
    config = recipe.load(RECIPE).to_dict()
    base = setup.open_base(**{**config["model"], "remat": "dots"})
    for rank in ranks:
        for scale, stabilized in SCALES.items():
            method = {"name": "lora", "rank": rank, "alpha": ALPHA, "rank_stabilized": stabilized}
            score = None
            for seed in range(seeds):
                run = setup.start(base, {**method, "targets": "all-linear"}, seed=seed)
                data = {**config["data"], "train_length": length, "train_limit": 64, "seed": seed}
                batch = next(setup.train_batches(base, data, batch_size=rows, accumulate=1))
                score = score or jax.jit(jax.value_and_grad(_mean(run)))
                value, grads = score(run.part.trainable, run.part.frozen, batch)
                by_b = {path: g for path, g in tree.flatten(grads).items() if path.endswith("/b")}
                norm = float(jnp.sqrt(sum(jnp.vdot(g, g) for g in by_b.values())))
                first = tree.flatten(run.part.trainable)  # Adam's first step: the gradient's sign; that of A is zero
                moved = first | {path: first[path] - STEP * jnp.sign(g) for path, g in by_b.items()}
                after, _ = score(tree.unflatten(moved), run.part.frozen, batch)
                straight = STEP * float(sum(jnp.abs(g).sum() for g in by_b.values()))
                yield {
                    "scale": scale,
                    "rank": rank,
                    "seed": seed,
                    "loss": float(value),
                    "gradient": norm,
                    "step": straight,
                    "fall": float(value - after),
                }


def _mean(run: setup.Run):
    def mean(trainable, frozen, batch):
        total, weight = loss.causal_lm(run.apply, tree.merge(frozen, trainable), batch)
        return total / weight

    return mean


def slopes(rows: Sequence[dict[str, Any]], scale: str, column: str) -> list[float]:
    """d log(column) / d log(rank), a seed each."""
    found = []
    for seed in sorted({r["seed"] for r in rows}):
        own = [r for r in rows if r["scale"] == scale and r["seed"] == seed]
        found.append(float(np.polyfit(np.log([r["rank"] for r in own]), np.log([r[column] for r in own]), 1)[0]))
    return found


def report(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    lines = [
        "# LoRA's scale over its rank",
        "",
        f"Run on a CPU, f32: SmolLM2-135M-Instruct, all linear layers, ranks {args.ranks}, alpha {ALPHA:g}, "
        f"{args.rows}x{args.length} tokens, {args.seeds} seeds (of A and of the batch). Slopes of the logarithm over "
        "the logarithm of the rank.",
        "",
        "| | scale | slope, theory | ours, mean | least to most |",
        "|---|---|--:|--:|--:|",
    ]
    for column, (what, *theory) in FIGURES.items():
        for scale, wanted in zip(SCALES, theory, strict=True):
            own = slopes(rows, scale, column)
            lines.append(f"| {what} | {scale} | {wanted:g} | {np.mean(own):.3f} | {min(own):.3f} to {max(own):.3f} |")
    far = max(abs(r["fall"] / r["step"] - 1) for r in rows)
    lines += [
        "",
        f"The fall is the straight line's: {STEP:g} (Adam's step) times the sum of the gradient's sizes. The loss that "
        f"was measured after the step falls by as much, within {far:.1%}.",
        "",
        "![Gradient and first step over the rank](slopes.png)",
    ]
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8.5, 3.3), layout="constrained")
    for axis, (column, (what, *_)) in zip(axes, FIGURES.items(), strict=True):
        for scale, style in zip(SCALES, ("o-", "s--"), strict=True):
            ranks = sorted({r["rank"] for r in rows})
            means = [np.mean([r[column] for r in rows if r["scale"] == scale and r["rank"] == n]) for n in ranks]
            axis.loglog(ranks, means, style, label=scale)
        axis.set(xlabel="rank", title=what)
        axis.set_xticks(ranks, list(map(str, ranks)))
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
