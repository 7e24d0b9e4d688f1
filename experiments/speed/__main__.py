"""A LoRA step of peftax against Hugging Face PEFT's and qwix's, alternating step by step on this CPU.

  python -m experiments.speed --workdir=runs/speed [--dtypes=float32,bfloat16,nf4 --steps=20 --threads=2]

Every contender is a process of its own with the same base, adapter, batches, optimizer and number of threads; only
one computes at a time. In every round each makes one step, in an order that turns round by round. Writes report.md
and results.json into the workdir.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.speed.side import WARM

OURS = "peftax"
TOLERANCE = {"float32": 1e-4, "nf4": 1e-3}  # of a loss, relative; bf16 is only reported


def contenders(dtype: str) -> dict[str, list[str]]:
    """Name -> module and arguments."""
    hf = "experiments.speed.hf_peft_side"
    found = {
        OURS: ["experiments.speed.peftax_side"],
        "peftax, no remat": ["experiments.speed.peftax_side", "--remat=none"],
        "peftax, unrolled": ["experiments.speed.peftax_side", "--scan=0", "--remat=none"],
        "HF PEFT, eager": [hf, "--kind=eager"],
        "HF PEFT, SDPA": [hf, "--kind=sdpa"],
        "HF PEFT, compile": [hf, "--kind=compile"],
    }
    if dtype == "bfloat16":
        found["HF PEFT, SDPA, autocast"] = [hf, "--kind=sdpa", "--autocast=1"]
        found["HF PEFT, compile, autocast"] = [hf, "--kind=compile", "--autocast=1"]
    if dtype == "nf4":
        return {name: found[name] for name in (OURS, "HF PEFT, eager", "HF PEFT, SDPA", "HF PEFT, compile")}
    if importlib.util.find_spec("qwix"):
        found["qwix"] = ["experiments.speed.qwix_side"]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/speed"))
    parser.add_argument("--dtypes", default="float32,bfloat16,nf4")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", help="comma-separated parts of names; peftax always takes part")
    parser.add_argument("--base", help="a Hugging Face folder; default: the quickstart's")
    args = parser.parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # XLA takes the threads it may run on
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    inputs = args.workdir / "inputs"
    more = [f"--base={args.base}"] if args.base else []
    command = [sys.executable, "-m", "experiments.speed.inputs", str(inputs), f"--steps={args.steps}", *more]
    subprocess.run(command, check=True)

    results: dict[str, Any] = {"machine": machine(args.threads), "steps": args.steps, "dtypes": {}}
    for dtype in args.dtypes.split(","):
        wanted = contenders(dtype)
        if args.only:
            parts = [OURS, *args.only.split(",")]
            wanted = {n: a for n, a in wanted.items() if any(p in n for p in parts)}
        figures = race(wanted, inputs, steps=args.steps, dtype=dtype, threads=args.threads, log=args.workdir)
        results["dtypes"][dtype] = {"contenders": figures, "summary": summarize(figures)}
        (args.workdir / "results.json").write_text(json.dumps(results, indent=1))
        (args.workdir / "report.md").write_text(report(results))
    print((args.workdir / "report.md").read_text())
    check(results)


def race(
    wanted: Mapping[str, Sequence[str]], inputs: Path, *, steps: int, dtype: str, threads: int, log: Path
) -> dict[str, dict[str, Any]]:
    """{name: load, steps, losses, memory} of contenders that take turns."""
    sides = {}
    figures: dict[str, dict[str, Any]] = {}
    try:
        for name, (module, *own) in wanted.items():
            command = [sys.executable, "-m", module, str(inputs), f"--dtype={dtype}", f"--threads={threads}", *own]
            with open(log / f"{dtype}-{name.replace(', ', '-').replace(' ', '-')}.log", "w") as err:
                sides[name] = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True
                )
            load = ask(name, sides[name], {"do": "load"})
            figures[name] = {"load": load["seconds"], "seconds": [], "losses": []}
        for number in range(steps):
            names = list(sides) if number % 2 == 0 else list(reversed(sides))
            for name in names:
                said = ask(name, sides[name], {"do": "step", "number": number})
                figures[name]["seconds"].append(said["seconds"])
                figures[name]["losses"].append(said["loss"])
                time.sleep(0.05)  # idle worker threads of the one before stop spinning
            told = "  ".join(f"{n} {figures[n]['seconds'][-1]:.2f}s" for n in sides)
            print(f"{dtype} step {number}: {told}", file=sys.stderr)
        for name, process in sides.items():
            figures[name]["memory"] = ask(name, process, {"do": "stop"})
    finally:
        for process in sides.values():
            process.stdin.close()  # ends its loop
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
    return figures


def ask(name: str, process: subprocess.Popen, order: Mapping[str, Any]) -> dict[str, Any]:
    """What a contender answers; RuntimeError where it ended instead."""
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{name} ended with {process.wait()} at {order}: its log lies in the workdir")
    return json.loads(line)


def summarize(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Ratios of tokens per second to each contender, pair by pair, and to the best of Hugging Face PEFT."""
    mine = figures[OURS]
    summary: dict[str, Any] = {}
    for name, f in figures.items():
        late = f["seconds"][WARM:]
        ratios = [theirs / ours for theirs, ours in zip(late, mine["seconds"][WARM:], strict=True)]
        far = [abs(a - b) / abs(b) for a, b in zip(mine["losses"], f["losses"], strict=True)]
        summary[name] = {
            "step": statistics.median(late),
            "compile": f["seconds"][0] - statistics.median(late),
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "pairs": len(ratios),
            "loss_difference": max(far),
            "peak": f["memory"]["peak"],
            "peak_later": f["memory"]["peak_later"],
            "load": f["load"],
        }
    hf = [n for n in figures if n.startswith("HF PEFT")]
    best = min(hf, key=lambda n: summary[n]["step"]) if hf else None
    return {"contenders": summary, "best_hf": best}


def check(results: Mapping[str, Any]) -> None:
    """The same losses, or no comparison."""
    for dtype, r in results["dtypes"].items():
        for name, s in r["summary"]["contenders"].items():
            if not s["loss_difference"] <= TOLERANCE.get(dtype, float("inf")):
                raise SystemExit(f"{name}: losses differ from peftax's by {s['loss_difference']:.1e}")


def report(results: Mapping[str, Any]) -> str:
    m = results["machine"]
    lines = [
        "# A LoRA step on this CPU",
        "",
        f"Run: {m['cpu']}, {m['threads']} threads, {', '.join(m['versions'])}.",
        "",
    ]
    for dtype, r in results["dtypes"].items():
        s, best = r["summary"]["contenders"], r["summary"]["best_hf"]
        lines += [
            f"## {dtype}",
            "",
            "| | s a step | tokens/s of peftax over its, median [least, most] of pairs | loss, furthest from peftax's "
            "| memory GiB: peak | after the first steps | first step more than others, s |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        for name, x in s.items():
            ratio = f"{x['ratio']:.2f} [{x['ratio_low']:.2f}, {x['ratio_high']:.2f}] of {x['pairs']}"
            far = f"{x['loss_difference']:.1e}"
            if name == OURS:
                ratio = far = "–"
            title = f"**{name}**" if name in (OURS, best) else name
            lines.append(
                f"| {title} | {x['step']:.2f} | {ratio} | {far} | {x['peak']:.2f} | {x['peak_later']:.2f} "
                f"| {x['compile']:.1f} |"
            )
        ours = r["contenders"][OURS]["losses"]
        lines += ["", f"peftax's loss went from {ours[0]:.4f} to {ours[-1]:.4f}.", ""]
        if best:
            lines += [f"Best of HF PEFT: {best}; **{s[best]['ratio']:.2f}×** its tokens per second.", ""]
    return "\n".join(lines)


def machine(threads: int) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = found[0] if found else cpu
    versions = []
    for name in ("jax", "flax", "torch", "transformers", "peft", "qwix"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"cpu": cpu, "threads": threads, "versions": versions}


if __name__ == "__main__":
    main()
