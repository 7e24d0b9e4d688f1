"""Trainable parameters that papers print, counted again on shapes: nothing is downloaded, no weight is made.

  python -m experiments.parameter_counts --workdir=runs/parameter_counts

Writes report.md, counts.csv, peft_runs.csv and counts.png. A count that is not its closed formula's integer ends the
run with an error; one that is not the printed figure is a finding.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.parameter_counts import cells
from experiments.parameter_counts.backbones import found
from experiments.parameter_counts.cells import Cell
from peftax import methods
from peftax.core.hf import Unsupported

RUNS = Path(__file__).parent / "peft_runs.json"
STATES = ("exact", "nominal", "differs", "unprinted")
NO_METHOD = "no method here"

Rows = list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/parameter_counts"))
    args = parser.parse_args(argv)
    args.workdir.mkdir(parents=True, exist_ok=True)
    rows = [row(cell) for cell in cells.all_cells()]
    recorded = peft_runs()
    save(args.workdir / "counts.csv", rows)
    save(args.workdir / "peft_runs.csv", recorded)
    (args.workdir / "report.md").write_text(report(rows, recorded))
    plot(args.workdir / "counts.png", rows)
    print(summary(rows, recorded))
    check(rows, recorded)


def row(cell: Cell) -> dict[str, Any]:
    computed = cell.compute()
    return {
        "paper": cell.paper,
        "cell": cell.cell,
        "backbone": cell.backbone,
        "counted": cell.counted,
        "worked_out": cell.worked_out,
        "computed": computed,
        "per_cent": f"{100 * computed / cell.per:.4f}" if cell.per else "",
        "published": cell.published,
        "agreement": cells.agreement(computed, cell.published, cell.per),
        "ratio": _ratio(cell, computed),
        "status": cells.status(cell, computed),
        "source": cell.source,
        "why": cell.why,
    }


def _ratio(cell: Cell, computed: int) -> str:
    """Printed over computed."""
    if not cell.published:
        return ""
    printed, scale = cells.read(cell.published, cell.per)
    return f"{printed * scale / computed:.4f}"


def peft_runs() -> Rows:
    """The runs that Hugging Face PEFT recorded, counted from their adapter_config.json on the linen backbone."""
    model, rows = found("Llama-3.2-3B"), []
    for run in json.loads(RUNS.read_text())["runs"]:
        try:
            if "needs" in run:  # the folder is another method's, the run is not
                raise Unsupported(run["needs"])
            name, settings = methods.from_peft(run["config"]) if run["config"] else ("", {})
        except Unsupported:
            rows.append(
                {"run": run["run"], "method": "", "recorded": run["trainable"], "computed": "", "status": NO_METHOD}
            )
            continue
        settings = {"name": name, **settings, **run.get("settings", {})}
        computed = model.count(**settings)
        status = "exact" if computed == run["trainable"] else "differs"
        method, recorded = settings["name"], run["trainable"]
        rows.append({"run": run["run"], "method": method, "recorded": recorded, "computed": computed, "status": status})
    return rows


def check(rows: Rows, recorded: Rows) -> None:
    """End with an error where a count is not what it must be."""
    wrong = [f"{r['paper']}, {r['cell']}: {r['computed']:,}" for r in rows if r["computed"] != r["worked_out"]]
    wrong += [f"{r['run']}: {r['computed']:,}" for r in recorded if r["status"] == "differs"]
    if wrong:
        raise SystemExit(f"{len(wrong)} counts are not what their formula or their record says: {'; '.join(wrong)}")


# --- what is written ---------------------------------------------------------------------------------------


def save(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def summary(rows: Rows, recorded: Rows) -> str:
    states, backbones, ways, runs = (
        Counter(r[key] for r in of)
        for key, of in (("status", rows), ("backbone", rows), ("counted", rows), ("status", recorded))
    )
    ends = Counter(r["agreement"] for r in rows)
    agree = sum(r["computed"] == r["worked_out"] for r in rows)
    return f"""\
{len(rows)} cells, of which {agree} equal the integer of their closed formula. Beside what is printed: \
{states["exact"]} exact ({ends["equal"]} to the last digit, {ends["rounded"]} rounded, {ends["truncated"]} truncated, \
{ends["below"]} as a bound), {states["nominal"]} nominal, {states["differs"]} differ, {states["unprinted"]} without a \
printed figure.
{backbones["linen"]} are counted on linen backbones, {backbones["shape-only"]} are shape-only, \
{backbones["none"]} need no model; {len(rows) - ways["formula"]} by a method of peftax, {ways["formula"]} by a formula.
{len(recorded)} runs that Hugging Face PEFT recorded: {runs["exact"]} equal, {runs["differs"]} differ, \
{runs[NO_METHOD]} of methods that peftax does not have."""


def report(rows: Rows, recorded: Rows) -> str:
    papers = list(dict.fromkeys(r["paper"] for r in rows))
    lines = ["# Parameter counts", "", summary(rows, recorded), ""]
    lines += table("paper", "cells:", "linen:", *(f"{state}:" for state in STATES))
    for paper in papers:
        own = [r for r in rows if r["paper"] == paper]
        states = Counter(r["status"] for r in own)
        linen = sum(r["backbone"] == "linen" for r in own)
        lines.append(line(paper, len(own), linen, *(states[state] for state in STATES)))
    lines += ["", "## What does not agree", ""]
    lines += table("paper", "cell", "computed:", "published:", "status", "what it may be")
    for r in rows:
        if r["status"] in ("nominal", "differs"):
            lines.append(line(r["paper"], r["cell"], _number(r), r["published"], r["status"], r["why"]))
    for paper in papers:
        lines += ["", f"## {paper}", ""]
        lines += table(
            "cell", "backbone", "counted by", "computed:", "published:", "agreement", "status", "published in"
        )
        for r in rows:
            if r["paper"] == paper:
                keys = ("published", "agreement", "status", "source")
                lines.append(line(r["cell"], r["backbone"], r["counted"], _number(r), *(r[k] for k in keys)))
    lines += ["", "## Runs that Hugging Face PEFT recorded on Llama-3.2-3B", ""]
    lines += [json.loads(RUNS.read_text())["source"], ""]
    lines += table("run", "method", "computed:", "recorded:", "status")
    for r in recorded:
        computed = f"{r['computed']:,}" if r["computed"] != "" else ""
        lines.append(line(r["run"], r["method"], computed, f"{r['recorded']:,}", r["status"]))
    return "\n".join(lines) + "\n"


def table(*names: str) -> list[str]:
    """A table's head; columns whose name ends in a colon hold numbers."""
    return [line(*(n.rstrip(":") for n in names)), f"|{'|'.join('--:' if n.endswith(':') else '---' for n in names)}|"]


def line(*values: Any) -> str:
    return f"| {' | '.join(map(str, values))} |"


def _number(r: Mapping[str, Any]) -> str:
    share = f" ({r['per_cent']}%)" if r["per_cent"] else ""
    return f"{r['computed']:,}{share}"


def plot(path: Path, rows: Rows) -> None:
    """How far the printed figures that do not agree are from the counts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"nominal": "C1", "differs": "C3"}
    shown = sorted((r for r in rows if r["status"] in colors), key=lambda r: -abs(float(r["ratio"]) - 1))[::-1]
    figure, axis = plt.subplots(figsize=(9, 0.3 * len(shown) + 1), constrained_layout=True)
    for state, color in colors.items():
        bars = [(i, 100 * (float(r["ratio"]) - 1)) for i, r in enumerate(shown) if r["status"] == state]
        axis.barh(*zip(*bars, strict=True), color=color, label=state)
    axis.axvline(0, color="gray", linewidth=0.8)
    names = [f"{r['paper'].split(' (')[0]}: {r['cell']}" for r in shown]
    axis.set_yticks(range(len(shown)), names, fontsize=8)
    axis.set(xlabel="printed above counted, %", xscale="symlog", xlim=(-20, 200))
    axis.set_xticks((-10, -1, 0, 1, 10, 100), ("-10", "-1", "0", "1", "10", "100"))
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
