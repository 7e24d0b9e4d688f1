"""Runs that differ in their learning rates in one program, against runs by themselves.

  python -m experiments.population race       eight members and one run, alternating step by step on this CPU
  python -m experiments.population compiled   up to 2048 members on a 4-bit 8B model, compiled for one A100 of 80 GB

The second compiles for a machine that is not here: make .venv-aot/.installed. Each writes its CSV file into --into.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.planner.__main__ import write as table
from experiments.speed.__main__ import machine, race
from experiments.speed.side import WARM

HERE = Path(__file__).parent
GIB = 1 << 30
MEMBERS = 8
SINGLE = {"scanned": [], "scanned, no remat": ["--remat=none"], "unrolled, no remat": ["--scan=0", "--remat=none"]}
MANY = {
    "own batches": [],
    "own batches, unrolled, no remat": ["--scan=0", "--remat=none"],
    "one batch for all": ["--shared=1"],
}
SIZES = {  # (rank, tokens of a member's only row): members
    (16, 512): (1, 8, 16, 32, 64),
    (4, 128): (1, 16, 64, 256),
    (1, 32): (1, 16, 256, 1024, 2048),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("race", "compiled"))
    parser.add_argument("--workdir", type=Path, default=Path("runs/population"))
    parser.add_argument("--into", type=Path, default=HERE)
    parser.add_argument("--lengths", default="32,256", help="of the race: tokens of a member's only row")
    parser.add_argument("--steps", type=int, default=9)
    args = parser.parse_args(argv)
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    args.into.mkdir(parents=True, exist_ok=True)
    if args.what == "compiled":
        write(args.into / "compiled.csv", compiled())
        return
    lengths = list(map(int, args.lengths.split(",")))
    rows = write(args.into / "race.csv", (row for length in lengths for row in against(length, args)))
    for length in lengths:
        own = [r for r in rows if r["tokens"] == length]
        best = min(r["seconds"] for r in own if r["members"] == 1)
        for r in own:
            if r["members"] > 1:
                print(f"1x{length}, {r['contender']}: {MEMBERS * best / r['seconds']:.2f} times the best single run")


def against(length: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each contender of a race."""
    threads = len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    inputs = args.workdir / f"1x{length}"
    given = ["--rows=1", f"--length={length}", f"--steps={args.steps}"]
    subprocess.run([sys.executable, "-m", "experiments.speed.inputs", str(inputs), *given], check=True)
    side = "experiments.population.side"
    wanted = {f"one, {name}": [side, *more] for name, more in SINGLE.items()}
    wanted |= {f"{MEMBERS}, {name}": [side, f"--members={MEMBERS}", *more] for name, more in MANY.items()}
    found = race(wanted, inputs, steps=args.steps, dtype="float32", threads=threads, log=args.workdir)
    print(machine(threads), file=sys.stderr)
    for name, figures in found.items():
        yield {
            "tokens": length,
            "contender": name,
            "members": 1 if name.startswith("one") else MEMBERS,
            "seconds": round(statistics.median(figures["seconds"][WARM:]), 4),
            "first step": round(figures["seconds"][0], 1),
            "peak GiB": round(figures["memory"]["peak"], 2),
            "loss": round(figures["losses"][-1], 4),
        }


def compiled() -> Iterator[dict[str, Any]]:
    """A row for each population: what `peftax plan --members` says."""
    from peftax import machines, plan, recipe

    for (rank, length), sizes in SIZES.items():
        for members in sizes:
            pairs = [
                *(("method.rank", str(rank)), ("data.train_length", str(length))),
                *(("train.batch_size", "1"), ("train.accumulate", "1")),
            ]
            config = recipe.load("llama3_8b_qlora", pairs).to_dict()
            done = plan.plan(config, machines.named("a100-80gb:1"), only=("step",), members=members)
            step = done.programs["step"]
            yield {
                "rank": rank,
                "tokens": length,
                "members": members,
                "GiB": round(done.peak / GIB, 2),
                "fits": done.fits,
                "packed GB a member-step": round(step.packed / members / 1e9, 3),
                "TFLOP": round(step.flops / 1e12, 1),
                "ms a member-step": round(1000 * done.seconds / members, 2),
                "bound": max(step.bounds, key=step.bounds.__getitem__),
            }


def write(file: Path, rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, kept as they come."""
    found = []
    for row in rows:
        print(row, file=sys.stderr)
        found.append(row)
        table(file, found)
    return found


if __name__ == "__main__":
    main()
