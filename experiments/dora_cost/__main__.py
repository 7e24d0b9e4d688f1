"""What DoRA's step costs more than LoRA's, in peftax and in Hugging Face PEFT, alternating step by step on this CPU.

  python -m experiments.dora_cost --workdir=runs/dora_cost [--cases=float32:4x256,nf4:1x512 --steps=7 --threads=2]

The contenders, their inputs and their turns are experiments/speed's. Adds a row per case to results.json in the
workdir and prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.speed.__main__ import TOLERANCE, machine, race
from experiments.speed.side import WARM

SIDES = {
    "peftax": ["experiments.speed.peftax_side"],
    "HF PEFT": ["experiments.speed.hf_peft_side", "--kind=sdpa"],
}
ADAPTERS = {"lora": "adapter", "dora": "adapter_dora"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/dora_cost"))
    parser.add_argument("--cases", default="float32:4x256,float32:1x512,nf4:4x256,nf4:1x512", help="dtype:ROWSxLENGTH")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    file = args.workdir / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for case in args.cases.split(","):
        dtype, shape = case.split(":")
        rows, length = shape.split("x")
        inputs = args.workdir / shape
        if not (inputs / "inputs.json").exists():
            more = [f"--rows={rows}", f"--length={length}", f"--steps={args.steps}", "--methods=lora,dora"]
            subprocess.run([sys.executable, "-m", "experiments.speed.inputs", str(inputs), *more], check=True)
        wanted = {
            f"{side}, {method}": [*command, f"--adapter={folder}"]
            for side, command in SIDES.items()
            for method, folder in ADAPTERS.items()
        }
        figures = race(wanted, inputs, steps=args.steps, dtype=dtype, threads=args.threads, log=args.workdir)
        check(figures, dtype)
        results[case] = summarize(figures) | {"machine": machine(args.threads), "seconds": seconds(figures)}
        file.write_text(json.dumps(results, indent=1))
    print(table(results))


def seconds(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    return {name: f["seconds"] for name, f in figures.items()}


def check(figures: Mapping[str, Mapping[str, Any]], dtype: str) -> None:
    """The same losses, or no comparison."""
    for method in ADAPTERS:
        ours, theirs = (figures[f"{side}, {method}"]["losses"] for side in SIDES)
        far = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
        if not far <= TOLERANCE[dtype]:
            raise SystemExit(f"{method}, {dtype}: losses differ by {far:.1e}")


def summarize(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds of a step, and DoRA's over LoRA's: medians, the differences round by round."""
    summary: dict[str, Any] = {}
    for side in SIDES:
        lora, dora = (figures[f"{side}, {method}"]["seconds"][WARM:] for method in ADAPTERS)
        more = [b - a for a, b in zip(lora, dora, strict=True)]
        summary[side] = {
            "lora": statistics.median(lora),
            "dora": statistics.median(dora),
            "more": statistics.median(more),
            "least": min(more),
            "most": max(more),
        }
    return summary | {"rounds": len(more), "of_theirs": summary["peftax"]["more"] / summary["HF PEFT"]["more"]}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| | rounds | peftax: LoRA, s | DoRA's more, s [least, most] | HF PEFT: LoRA, s | DoRA's more, s [least, most] "
        "| peftax's more over PEFT's |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for case, r in results.items():
        cells = [f"{r[s]['lora']:.2f} | {r[s]['more']:.2f} [{r[s]['least']:.2f}, {r[s]['most']:.2f}]" for s in SIDES]
        lines.append(f"| {case.replace(':', ', ')} | {r['rounds']} | {' | '.join(cells)} | {r['of_theirs']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
