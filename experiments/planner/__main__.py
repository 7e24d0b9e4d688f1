"""What the planner says of the recipes' machines, how far it can be checked here, and what scale costs.

  python -m experiments.planner validate    planned against measured memory and operations, SmolLM2 on this CPU
  python -m experiments.planner recipes     every recipe on every machine that it names [--only=llama3_70b_qlora]
  python -m experiments.planner frontier    rows x length of the 70B recipe that fit one A100 of 80 GB
  python -m experiments.planner scale       8, 64, 256 devices at a fixed batch a device, with a plot
  python -m experiments.planner example     70B, 10,000 reports of 512 tokens, one epoch, one A100

All but the first compile for machines that are not here: make .venv-aot/.installed. Each writes NAME.csv (or .md) into
--into, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GIB = 1 << 30
HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=TABLES)
    parser.add_argument("--into", type=Path, default=HERE)
    parser.add_argument("--only", help="of recipes: one")
    args = parser.parse_args(argv)
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    args.into.mkdir(parents=True, exist_ok=True)
    TABLES[args.what](args)


def rows_of(
    file: Path, cells: Sequence[dict[str, Any]], make: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict]:
    """A row for each cell, kept in a CSV file as they come; those that stand there are not made again."""
    found = list(csv.DictReader(file.open())) if file.exists() else []
    for cell in cells:
        if any(all(row[k] == str(v) for k, v in cell.items()) for row in found):
            continue
        row = {k: str(v) for k, v in {**cell, **make(cell)}.items()}
        print(row, file=sys.stderr)
        found.append(row)
        write(file, found)
    return found


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as CSV."""
    with file.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def planned(config: str, topology: str, *overrides: str, programs: str = "step") -> dict[str, Any]:
    """What `peftax plan --json` says, in a process of its own: a compiler may crash."""
    command = [sys.executable, "-c", "import sys; from peftax.cli import main; sys.exit(main())", "plan"]
    given = [f"--config={config}", f"--topology={topology}", "--json", *overrides, "--programs", *programs.split(",")]
    done = subprocess.run([*command, *given], capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:160]}
    return json.loads(done.stdout)


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """The columns of a table."""
    names = ("GiB", "fits", "base GiB", "TFLOP", "messages GiB", "seconds at peak", "bound", "tokens", "compile s")
    if "error" in found:
        return dict.fromkeys(names, "") | {"GiB": found["error"]}
    step = found["programs"]["step"]
    bound = max(step["bounds"], key=step["bounds"].get)
    values = (
        f"{step['bytes'] / GIB:.2f}",
        found["fits"],
        f"{found['kinds']['base'] / GIB:.3f}",
        f"{step['flops'] / 1e12:.1f}",
        f"{sum(step['messages'].values()) / GIB:.2f}",
        f"{step['bounds'][bound]:.3f}",
        bound,
        found["tokens"],
        f"{step['compiled']:.0f}",
    )
    return dict(zip(names, values, strict=True))


def recipes(args: argparse.Namespace) -> None:
    from peftax import recipe

    names = [args.only] if args.only else [n for n in recipe.shipped() if recipe.machines(n)]
    cells = [{"recipe": n, "machine": m} for n in names for m in recipe.machines(n)]
    rows_of(args.into / "recipes.csv", cells, lambda c: figures(planned(c["recipe"], c["machine"])))


def frontier(args: argparse.Namespace) -> None:
    """For each length the batch is doubled until the step does not fit."""
    file, done = args.into / "frontier.csv", {}
    for remat in ("full", "offload"):
        for length in (512, 1024, 2048, 4096, 8192):
            for batch in (1, 2, 4, 8, 16, 32):
                cell = {"remat": remat, "length": length, "rows": batch}

                def make(c):
                    given = (f"--config.data.length={c['length']}", f"--config.train.batch_size={c['rows']}")
                    more = ("--config.train.accumulate=1", f"--config.model.remat={c['remat']}")
                    return figures(planned("llama3_70b_qlora", "a100-80gb:1", *given, *more))

                row = rows_of(file, [cell], make)
                done = next(r for r in row if all(r[k] == str(v) for k, v in cell.items()))
                if done["fits"] != "True":
                    break


def scale(args: argparse.Namespace) -> None:
    from matplotlib import pyplot

    def make(cell):
        devices = int(cell["machine"].rpartition("-")[2])
        given = (f"--config.train.batch_size={devices}", "--config.train.accumulate=1")
        found = planned("llama3_70b_qlora", cell["machine"], *given)
        kinds = found.get("kinds", {})
        return {**figures(found), **{f"{kind} GiB": f"{n / GIB:.3f}" for kind, n in kinds.items()}}

    rows = rows_of(args.into / "scale.csv", [{"machine": f"v6e-{n}"} for n in (8, 64, 256)], make)
    names = [row["machine"] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    below = [0.0] * len(rows)
    for kind in ("base", "adapters", "optimizer", "activations", "temporaries"):
        heights = [float(row[f"{kind} GiB"]) for row in rows]
        left.bar(names, heights, bottom=below, label=kind)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    left.axhline(32, color="gray", linewidth=0.8, linestyle=":")
    left.set(ylabel="GiB on one device (compiled)", title="memory")
    left.legend(fontsize=8)
    right.bar(names, [float(row["messages GiB"]) for row in rows], color="tab:purple")
    right.set(ylabel="GiB that reach one device (counted)", title="messages of a step")
    figure.savefig(args.into / "scale.png", dpi=120)


def example(args: argparse.Namespace) -> None:
    """The README's: what "under four hours" needs."""
    given = ("--config.data.length=512", "--config.train.batch_size=4", "--config.train.accumulate=4")
    found = planned("llama3_70b_qlora", "a100-80gb:1", "--tokens", str(10_000 * 512), *given)
    needed = found["epoch"]["30%"]["hours"] * 0.3 / 4
    lines = [f"| {share} | {e['hours']:.2f} |" for share, e in found["epoch"].items()]
    table = ["| share of peak | hours |", "|---|--:|", *lines, f"| {needed:.1%} | 4.00 |"]
    text = (
        f"peak of a step {found['peak'] / GIB:.1f} GiB of {found['available'] / GIB:.1f}\n\n" + "\n".join(table) + "\n"
    )
    (args.into / "example.md").write_text(text)
    print(text)


def validate(args: argparse.Namespace) -> None:
    cells = [
        {"rows": rows, "length": length, "remat": remat, "quantize": quantize}
        for rows, length in ((4, 256), (1, 1024))
        for remat in ("dots", "full", "none")
        for quantize in ("none", "nf4")
    ]

    def make(cell):
        command = [sys.executable, "-m", "experiments.planner.measured", json.dumps(cell)]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])

    rows_of(args.into / "validate.csv", cells, make)


TABLES = {f.__name__: f for f in (validate, recipes, frontier, scale, example)}

if __name__ == "__main__":
    main()
