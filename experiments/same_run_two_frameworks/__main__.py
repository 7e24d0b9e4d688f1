"""The same run in peftax and in Hugging Face PEFT: one adapter, the same batches, step by step in turns on this CPU.

  python -m experiments.same_run_two_frameworks --workdir=runs/same_run [--methods=lora,dora,oft,adalora --steps=200]

Writes losses.csv, figures.csv, losses.png and report.md into --into (by default beside this file).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from experiments.same_run_two_frameworks.inputs import METHODS, RATES
from experiments.speed.__main__ import ask, machine
from experiments.speed.side import WARM

HERE = Path(__file__).parent
SIDES = {"peftax": "peftax_side", "HF PEFT": "hf_peft_side"}
TENSORS = "adapter_model.safetensors"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/same_run"))
    parser.add_argument("--into", type=Path, default=HERE)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    inputs = args.workdir / "inputs"
    given = [f"--{name}={getattr(args, name)}" for name in ("methods", "rows", "length", "steps")]
    command = [sys.executable, "-m", "experiments.same_run_two_frameworks.inputs", str(inputs), *given]
    subprocess.run(command, check=True)
    found = {}
    for name in args.methods.split(","):
        kept = args.workdir / f"{name}.json"  # a method that was run is not run again
        if not kept.exists():
            kept.write_text(json.dumps(race(name, inputs, args)))
        found[name] = json.loads(kept.read_text())
    write(found, args)


def race(name: str, inputs: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Steps in turns; then gradients at one adapter, and answers of both with both adapters."""
    told = json.loads((inputs / "inputs.json").read_text())
    first = np.load(inputs / "tokens.npy")[0].tolist()
    at = args.workdir / name
    at.mkdir(parents=True, exist_ok=True)
    sides, figures = {}, {}
    try:
        for side, module in SIDES.items():
            command = [sys.executable, "-m", f"experiments.same_run_two_frameworks.{module}", str(inputs)]
            with open(at / f"{module}.log", "w") as err:
                sides[side] = subprocess.Popen(
                    [*command, f"--adapter={name}", f"--threads={args.threads}"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=err,
                    text=True,
                )
            ask(side, sides[side], {"do": "load"})
            figures[side] = {"seconds": [], "losses": []}
        for number in range(args.steps):
            for side in list(sides) if number % 2 == 0 else list(reversed(sides)):
                said = ask(side, sides[side], {"do": "step", "number": number})
                figures[side]["seconds"].append(said["seconds"])
                figures[side]["losses"].append(said["loss"])
                time.sleep(0.02)  # idle worker threads of the one before stop spinning
        folders = {side: str(at / f"by_{module}") for side, module in SIDES.items()}
        for side in sides:
            ask(side, sides[side], {"do": "save", "into": folders[side]})
        for side, module in SIDES.items():
            one = folders["peftax"]
            into = str(at / f"gradients_{module}")
            ask(side, sides[side], {"do": "gradients", "folder": one, "batch": first, "into": into})
            figures[side]["answers"] = {
                whose: ask(side, sides[side], {"do": "generate", "folder": folder, "prompts": told["questions"]})[
                    "said"
                ]
                for whose, folder in folders.items()
            }
            figures[side]["memory"] = ask(side, sides[side], {"do": "stop"})
    finally:
        for process in sides.values():
            process.kill()
    mine, theirs = (load_file(at / f"gradients_{module}" / TENSORS) for module in SIDES.values())
    return {"sides": figures, "gradients": errors(mine, theirs, load_file(at / "by_peftax_side" / TENSORS))}


def errors(mine: Mapping[str, Any], theirs: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, float]:
    """{tensor: the largest difference over the largest number}, of those that train."""
    trained = [key for key in theirs if key in mine and not np.array_equal(theirs[key], start[key])]
    return {key: float(np.abs(mine[key] - theirs[key]).max() / np.abs(theirs[key]).max()) for key in trained}


def write(found: Mapping[str, Mapping[str, Any]], args: argparse.Namespace) -> None:
    """The table, the curves, and what stands behind both."""
    args.into.mkdir(parents=True, exist_ok=True)
    with (args.into / "losses.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("method", "step", *SIDES))
        for name, run in found.items():
            pairs = zip(*(run["sides"][side]["losses"] for side in SIDES), strict=True)
            writer.writerows((name, step, *map("{:.6f}".format, pair)) for step, pair in enumerate(pairs, 1))
    rows = [row(name, run, args.rows * args.length) for name, run in found.items()]
    with (args.into / "figures.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(found, args.into / "losses.png")
    m = machine(args.threads)
    lines = [
        "# The same run in two frameworks",
        "",
        f"Run: {m['cpu']}, {m['threads']} threads, {', '.join(m['versions'])}; SmolLM2-135M-Instruct in f32, "
        f"{args.rows}x{args.length} tokens, {args.steps} steps of AdamW.",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|---|" + "--:|" * (len(rows[0]) - 1),
        *("| " + " | ".join(map(str, r.values())) + " |" for r in rows),
        "",
        "![The losses of both, one over the other](losses.png)",
    ]
    (args.into / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def row(name: str, run: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """A method's line of the table."""
    ours, theirs = (run["sides"][side] for side in SIDES)
    far = [abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
    rates = [tokens / statistics.median(s["seconds"][WARM:]) for s in (ours, theirs)]
    same = sum(
        ours["answers"][whose][i] == theirs["answers"][whose][i]
        for whose in SIDES
        for i in range(len(ours["answers"][whose]))
    )
    asked = sum(len(a) for a in ours["answers"].values())
    return {
        "method": name,
        "learning rate": f"{RATES[name]:g}",
        "loss, first": f"{ours['losses'][0]:.4f}",
        "loss, last": f"{ours['losses'][-1]:.4f}",
        "furthest apart, first 20 steps": f"{max(far[:20]):.1e}",
        "furthest apart": f"{max(far):.1e}",
        "tensors": len(run["gradients"]),
        "gradients' worst": f"{max(run['gradients'].values()):.1e}",
        "answers alike": f"{same} of {asked}",
        "tokens/s, peftax": f"{rates[0]:.0f}",
        "tokens/s, HF PEFT": f"{rates[1]:.0f}",
        "GiB, peftax": f"{ours['memory']['peak']:.2f}",
        "GiB, HF PEFT": f"{theirs['memory']['peak']:.2f}",
    }


def draw(found: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(3.4 * len(found), 3), layout="constrained", squeeze=False)
    for axis, (name, run) in zip(axes[0], found.items(), strict=True):
        styles = ({"linewidth": 3, "alpha": 0.4}, {"linewidth": 0.9, "linestyle": "--", "color": "black"})
        for side, style in zip(SIDES, styles, strict=True):
            axis.plot(
                range(1, len(run["sides"][side]["losses"]) + 1), run["sides"][side]["losses"], label=side, **style
            )
        axis.set(title=name, xlabel="step")
    axes[0][0].set_ylabel("loss")
    axes[0][0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
