"""One batch whose rows take different adapters: its cost beside one adapter for all rows, in peftax and HF PEFT.

  python -m experiments.mixed_batch --workdir=runs/mixed_batch [--targets=attention,all --rounds=1:40,256:5]

Each library is a process of its own with the same base, adapter folders, tokens and number of threads; only one
computes at a time. In every round each makes one forward pass of every case, in an order that turns round by round.
Writes report.md and results.json into the workdir, and fails where a row is not as its adapter alone would have it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.mixed_batch.cases import BATCH, CASES, ONE, RANKS, TARGETS
from experiments.speed.__main__ import ask, machine

OURS = "peftax"
SIDES = {OURS: "experiments.mixed_batch.peftax_side", "HF PEFT": "experiments.mixed_batch.hf_peft_side"}
TOLERANCE = 1e-5  # of the largest logit: a row against its adapter alone
BETWEEN = 1e-3  # the two libraries' logits


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/mixed_batch"))
    parser.add_argument("--targets", default="attention,all", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--rounds", default="1:40,256:5", help="tokens a row : rounds, several with commas")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default=",".join(SIDES), help="which libraries; peftax alone needs no torch")
    parser.add_argument("--base", help="a Hugging Face folder; default: the quickstart's")
    args = parser.parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    rounds = {int(t): int(n) for t, n in (pair.split(":") for pair in args.rounds.split(","))}
    results: dict[str, Any] = {"machine": machine(args.threads), "targets": {}}
    for targets in args.targets.split(","):
        inputs = args.workdir / targets
        if not (inputs / "inputs.json").exists():
            more = [f"--base={args.base}"] if args.base else []
            made = [sys.executable, "-m", "experiments.mixed_batch.inputs", str(inputs), f"--targets={targets}", *more]
            subprocess.run(made, check=True)
        wanted = {n: SIDES[n] for n in args.only.split(",")}
        for tokens, figures in race(wanted, inputs, rounds, args.threads, args.workdir):
            results["targets"].setdefault(targets, {})[str(tokens)] = figures
            (args.workdir / "results.json").write_text(json.dumps(results, indent=1))
            (args.workdir / "report.md").write_text(report(results))
    print((args.workdir / "report.md").read_text())
    check(results)


def race(
    wanted: Mapping[str, str], inputs: Path, rounds: Mapping[int, int], threads: int, log: Path
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(tokens, {library: {"seconds": {case: [...]}, "row" or "between": how far logits lie apart}})."""
    sides: dict[str, subprocess.Popen] = {}
    try:
        for name, module in wanted.items():
            command = [sys.executable, "-m", module, str(inputs), str(threads)]
            err = (log / f"{name}.log").open("w")
            sides[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True
            )
            ask(name, sides[name], {"do": "load"})
        for tokens, n in rounds.items():
            mine = {name: {"seconds": {case: [] for case in CASES}} for name in sides}
            for name, side in sides.items():  # compiles, and compares
                mine[name] |= ask(name, side, {"do": "check", "tokens": tokens})
            for number in range(n):
                order = [(name, case) for name in sides for case in CASES]
                for name, case in order if number % 2 == 0 else order[::-1]:
                    said = ask(name, sides[name], {"do": "run", "tokens": tokens, "case": case})
                    mine[name]["seconds"][case].append(said["seconds"])
            yield tokens, mine
            print(f"{inputs.name}, {tokens} tokens a row: done", file=sys.stderr)
    finally:
        for process in sides.values():
            process.stdin.close()  # ends its loop
            process.wait(timeout=60)


def ratio(seconds: Mapping[str, Sequence[float]], case: str, over: str) -> float:
    """The median over the rounds of a case's time over another's."""
    return statistics.median(a / b for a, b in zip(seconds[case], seconds[over], strict=True))


def report(results: Mapping[str, Any]) -> str:
    m = results["machine"]
    most = max(CASES.values(), key=lambda n: n or 0)
    few, many = (f"{n} adapters" for n in (2, most))
    lines = [
        f"# Rows of one batch through different adapters: {BATCH} rows, ranks {', '.join(map(str, RANKS))} in turn",
        "",
        f"Run: {m['cpu']}, {m['threads']} threads, {', '.join(m['versions'])}.",
        "",
    ]
    for targets, figures in results["targets"].items():
        lines += [f"## Targets: {TARGETS[targets][1]}", ""]
        for tokens, sides in figures.items():
            rows = " | ".join(f"{name}, s | over one" for name in sides)
            n = len(next(iter(next(iter(sides.values()))["seconds"].values())))
            lines += [f"{BATCH} rows of {tokens}, {n} rounds:", "", f"| | {rows} |", "|---|" + "--:|--:|" * len(sides)]
            for case in CASES:
                each = [
                    f"{statistics.median(s['seconds'][case]):.4f} | {ratio(s['seconds'], case, ONE):.2f}"
                    for s in sides.values()
                ]
                lines.append(f"| {case} | {' | '.join(each)} |")
            grown = [f"| {ratio(s['seconds'], many, few):.2f}" for s in sides.values()]
            lines += [f"| {many} over {few} | {' | '.join(grown)} |", ""]
            far = {name: s.get("row", s.get("between")) for name, s in sides.items()}
            told = f"Furthest that a row lies from its adapter alone: {far.pop(OURS):.1e} of the largest logit"
            told += "".join(f"; {name} from peftax: {f:.1e}" for name, f in far.items())
            lines += [f"{told}.", ""]
    return "\n".join(lines)


def check(results: Mapping[str, Any]) -> None:
    """Rows as their adapters alone, and both libraries alike, or no comparison."""
    for figures in results["targets"].values():
        for tokens, sides in figures.items():
            for name, s in sides.items():
                if not s.get("row", 0.0) <= TOLERANCE or not s.get("between", 0.0) <= BETWEEN:
                    raise SystemExit(f"{name}, {tokens} tokens a row: logits differ, {s}")


if __name__ == "__main__":
    main()
