"""How far off a weight is after quantization, by format and block: on normal numbers, and on real weights.

  python -m experiments.quantization --workdir=runs/quantization [--seed=0]

Every figure that has a reference stands beside it with a tolerance and a status; one outside ends the run with an
error. Writes report.md, results.json, cells.csv, errors.csv and two plots (PNG and SVG) into the workdir.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.quantization import formats, low_rank, references, samples
from experiments.quantization.formats import Errors
from experiments.quantization.references import GATES, SIGMAS, Cell
from peftax.ops.qtensor import GROUPS, LEVELS
from peftax.ops.quantize import quantize

BLOCKS = GROUPS["nf4"]
REAL_BLOCKS = (32, 64, 128)  # those that divide a K of 384
BLOCK = 64  # of the tables
BY_BLOCK = ("NF4", "NF4 double", "FP4", "E2M1", "E3M0", "Int4")
ONE_BLOCK = {"Q4_0": 32, "Q4_1": 32, "Q8_0": 32, "Int8": None}
DRAWS = 4  # of 1024 x 1024 numbers, as bitsandbytes' tests draw them, out of samples.SHAPE
TABLES = ("bits per weight", "levels", "bitsandbytes' gates", "element error", "double quantization", "nuclear norm")
EARLIER = "calculated before"  # see references.py

Rows = list[dict[str, Any]]  # data, kind, format, block, weights, bits, mae, mse, relative, norm_ratio


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/quantization"))
    parser.add_argument("--seed", type=int, default=0, help="of the normal numbers")
    args = parser.parse_args(argv)
    args.workdir.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    print("normal numbers", file=sys.stderr)
    cells, rows = on_normal(samples.normal(args.seed))
    cells += of_bits()
    print("a branch of low rank on toy matrices", file=sys.stderr)
    toy, ranks = on_toys(args.seed)
    cells += toy
    shapes = {}
    for model, read in (("MiniLM", samples.minilm), ("Whisper", samples.whisper)):
        print(model, file=sys.stderr)
        layers = read()
        shapes[model] = {kind: samples.describe(w) for kind, w in layers.items()}
        rows += on_real(model, layers)
        square = [low_rank.reductions(w.astype(np.float64), 16) for w in layers["query"]]
        ranks.append({"w": f"{model}, query, {len(square)} matrices", "rank": 16, **_mean(square)})

    cells.sort(key=lambda c: TABLES.index(c.table))
    results = {
        "machine": machine(),
        "seconds": time.perf_counter() - began,
        "seed": args.seed,
        "cells": [dataclasses.asdict(c) | {"status": c.status} for c in cells],
        "errors": rows,
        "layers": shapes,
        "low_rank": ranks,
    }
    write(args.workdir, results)
    plot(args.workdir, rows)
    print((args.workdir / "report.md").read_text())
    check(cells)


def on_normal(w_KxN: np.ndarray) -> tuple[list[Cell], Rows]:
    """The cells of the element table and of bitsandbytes' gates, and all errors on these numbers."""
    cells, rows = [], []
    for title, block in _trials(BLOCKS):
        back, bits = formats.there_and_back(w_KxN, title, block)
        rows.append(row("normal", "normal", title, block, formats.between(w_KxN, back, bits)))
        if printed := references.ELEMENT.get(block, {}).get(title):
            spread = formats.standard_errors(w_KxN, back, block)
            for what, figure, se in zip(("mae", "mse"), printed, spread, strict=True):
                # both figures are of samples, and one is rounded
                tolerance = 4 * 2**0.5 * se + references.half_digit(figure)
                cell = f"{title}, block {block}, {what.upper()}"
                cells.append(Cell("element error", cell, rows[-1][what], figure, tolerance, EARLIER))
        cells += gates(w_KxN, back, title, block) if title in GATES else []
    return cells + of_double(w_KxN, rows), rows


def gates(w_KxN: np.ndarray, back: np.ndarray, title: str, block: int) -> list[Cell]:
    """bitsandbytes' own: of DRAWS draws the figure that is furthest from its mean."""
    pieces = zip(np.split(w_KxN, DRAWS, 1), np.split(back, DRAWS, 1), strict=True)
    draws = [formats.between(w, b).means() for w, b in pieces]
    cells = []
    for what, printed in GATES[title].items():
        figure, sigma = printed[block]
        furthest = max((d[what] for d in draws), key=lambda x: abs(x - float(figure)))
        name = f"{title}, block {block}, {'mean error' if what == 'mae' else 'relative'}"
        cells.append(Cell("bitsandbytes' gates", name, furthest, figure, SIGMAS * sigma, "bitsandbytes' tests"))
    return cells


def of_double(w_KxN: np.ndarray, rows: Rows) -> list[Cell]:
    """What double quantization adds to NF4's MSE, with bitsandbytes' second levels and with evenly spaced ones."""
    plain, double = (find(rows, "normal", "normal", title, BLOCK)["mse"] for title in ("NF4", "NF4 double"))
    even = formats.between(w_KxN, formats.evenly_doubled(w_KxN, BLOCK)).means()["mse"]
    spread = 4 * 2**0.5 * formats.standard_errors(w_KxN, formats.there_and_back(w_KxN, "NF4", BLOCK)[0], BLOCK)[1]
    before, after = references.EVENLY_DOUBLE
    # the numbers are the same with and without: of the change only the rounding of two printed figures is left
    told = (
        ("NF4's MSE", plain, before, spread + references.half_digit(before), EARLIER),
        ("NF4's MSE, evenly spaced", even, after, spread + references.half_digit(after), EARLIER),
        ("change, evenly spaced", even - plain, f"{float(after) - float(before):.0e}", 1e-6, EARLIER),
        ("change", double - plain, references.DOUBLE_CHANGE, 1e-6, "bitsandbytes 0.50.2 on seed 0"),
    )
    return [Cell("double quantization", *rest) for rest in told]


def of_bits() -> list[Cell]:
    """Bits per weight from the arrays of a QTensor, what that saves, and NF4's levels from their definition."""
    w = np.zeros((BLOCK * 256, 64), np.float32)  # whole groups of 256 blocks
    found = {}
    for title in references.BITS:
        fmt, double = formats.OURS[title]
        found[title] = formats.bits(quantize(w, fmt, group=BLOCK, double=double), offset=False)
    cells = [
        Cell("bits per weight", f"{title}, block {BLOCK}", found[title], exact, 0.0, f"QLoRA, section 3: {printed}")
        for title, (exact, printed) in references.BITS.items()
    ]
    saved = (found["NF4"] - found["NF4 double"]) / 8 * references.LINEAR_65B / 1e9
    name = "saved by double quantization on LLaMA-65B, GB"
    cells.append(Cell("bits per weight", name, saved, references.SAVED_65B, 0.005, "QLoRA, section 3: about 3"))
    away = float(np.abs(normal_map() - np.array(LEVELS["nf4"])).max())
    name = "NF4's levels from their definition, furthest from those in use"
    cells.append(Cell("levels", name, away, references.NORMAL_MAP, 0.05e-7, EARLIER))
    return cells


def normal_map() -> np.ndarray:
    """NF4's levels from quantiles of a normal distribution, f64 [16]: QLoRA, appendix E."""
    quantile = np.vectorize(statistics.NormalDist().inv_cdf)
    above = quantile(np.linspace(references.NORMAL_OFFSET, 0.5, 9)[:-1])
    below = -quantile(np.linspace(references.NORMAL_OFFSET, 0.5, 8)[:-1])
    return np.sort(np.concatenate([above, [0.0], below])) / above.max()


def on_toys(seed: int) -> tuple[list[Cell], Rows]:
    """Reduction of the nuclear norm of NF4's error by branches of low rank, 512 x 512, three draws."""
    cells, rows = [], []
    makers = {
        "Gaussian": lambda rng: rng.standard_normal((512, 512)),
        "decaying": lambda rng: low_rank.decaying(rng, 512),
    }
    for spectrum, make in makers.items():
        drawn = [make(np.random.default_rng(seed + i)) for i in range(3)]
        for rank, printed in references.NUCLEAR[spectrum].items():
            found = [low_rank.reductions(w, rank) for w in drawn]
            rows.append({"w": f"{spectrum}, 3 draws", "rank": rank, **_mean(found)})
            for method, figure in printed.items():
                # the decay behind the reference is not known
                tolerance = 0.3 if spectrum == "Gaussian" else None
                name = f"{spectrum}, rank {rank}, {method}, %"
                cells.append(Cell("nuclear norm", name, rows[-1][method], figure, tolerance, EARLIER))
    return cells, rows


def on_real(model: str, layers: samples.Layers) -> Rows:
    """The errors of every kind of layer, and of all linear layers together."""
    rows = []
    for title, block in _trials(REAL_BLOCKS):
        linear = Errors()
        for kind, weights in layers.items():
            if kind == samples.EMBEDDING and block not in (BLOCK, ONE_BLOCK.get(title)):
                continue
            errors = sum((formats.measure(w, title, block) for w in weights), Errors())
            rows.append(row(model, kind, title, block, errors))
            if kind != samples.EMBEDDING:
                linear += errors
        rows.append(row(model, "linear", title, block, linear))
    return rows


def _trials(blocks: Iterable[int]) -> list[tuple[str, int | None]]:
    return [(title, b) for title in BY_BLOCK for b in blocks] + list(ONE_BLOCK.items())


def row(data: str, kind: str, title: str, block: int | None, errors: Errors) -> dict[str, Any]:
    key = {"data": data, "kind": kind, "format": title, "block": block or "column", "weights": errors.count}
    return key | errors.means()


def find(rows: Rows, data: str, kind: str, title: str, block: int | None) -> dict[str, Any]:
    wanted = (data, kind, title, block or "column")
    (found,) = (r for r in rows if (r["data"], r["kind"], r["format"], r["block"]) == wanted)
    return found


def _mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {k: statistics.fmean(f[k] for f in found) for k in found[0]}


def check(cells: Sequence[Cell]) -> None:
    """No figure away from its reference."""
    outside = [c for c in cells if c.status == "OUTSIDE"]
    if outside:
        told = "; ".join(f"{c.table}, {c.cell}: {c.computed:.6g}, wanted {c.reference}" for c in outside)
        raise SystemExit(f"{len(outside)} of {len(cells)} figures are outside their tolerance: {told}")


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = (
        [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
        if (info.exists())
        else []
    )
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "numpy")]
    return {"cpu": names[0] if names else platform.machine(), "versions": versions}


def write(workdir: Path, results: Mapping[str, Any]) -> None:
    (workdir / "results.json").write_text(json.dumps(results, indent=1))
    for name in ("cells", "errors"):
        with open(workdir / f"{name}.csv", "w", newline="") as file:
            table = csv.DictWriter(file, results[name][0], lineterminator="\n")
            table.writeheader()
            table.writerows({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in r.items()} for r in results[name])
    (workdir / "report.md").write_text(report(results))


def report(results: Mapping[str, Any]) -> str:
    """The page that says what was found."""
    m, rows = results["machine"], results["errors"]
    states = [c["status"] for c in results["cells"]]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("exact", "as printed", "within", "not compared", "OUTSIDE"))
    lines = [
        "# Quantization error by format",
        "",
        f"Run: {m['cpu']}, {', '.join(m['versions'])}, seed {results['seed']}, {results['seconds']:.0f} s.",
        "",
        f"{len(states)} figures beside their references: {counts}.",
        "",
        "## Normal numbers, all formats",
        "",
        f"{rows[0]['weights']:,} draws of N(0, 1). E2M1, E3M0 and Int4 in blocks above 128 by their levels, "
        "the rest by peftax.ops.quantize.",
        "",
        *_errors_table(rows, "normal", "normal", tables=(32, 64, 4096)),
        "",
        "## Beside their references",
        "",
        *_cells_table(results["cells"]),
        "",
    ]
    for model, kinds in results["layers"].items():
        lines += [
            f"## {model}, all linear layers",
            "",
            *_errors_table(rows, model, "linear", tables=REAL_BLOCKS),
            "",
            f"## {model} by kind of layer, block {BLOCK}",
            "",
            "Root mean square of the error over that of the weights, %.",
            "",
            *_kinds_table(rows, model, kinds),
            "",
        ]
    methods = low_rank.METHODS
    lines += [
        "## Reduction of the nuclear norm of NF4's error by a branch of low rank, %",
        "",
        f"| W | rank | {' | '.join(methods)} |",
        f"|---|--:|{'--:|' * len(methods)}",
    ]
    for r in results["low_rank"]:
        lines.append(f"| {r['w']} | {r['rank']} | {' | '.join(f'{r[k]:.1f}' for k in methods)} |")
    return "\n".join(lines) + "\n"


def _errors_table(rows: Rows, data: str, kind: str, *, tables: Sequence[int]) -> list[str]:
    lines = [
        "| format | block | bits per weight | MAE | MSE | mean of error / weight | RMS error / RMS weight, % |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for title, block in [*((t, b) for b in tables for t in BY_BLOCK), *ONE_BLOCK.items()]:
        r = find(rows, data, kind, title, block)
        lines.append(
            f"| {title} | {r['block']} | {r['bits']:.4f} | {r['mae']:.4g} | {r['mse']:.4g} | {r['relative']:.4f} "
            f"| {100 * r['norm_ratio']:.3f} |"
        )
    return lines


def _cells_table(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| | figure | computed | reference | tolerance | status | reference from |",
        "|---|---|--:|--:|--:|---|---|",
    ]
    for c in cells:
        computed = f"{c['computed']:.{10 if c['status'] == 'exact' else 6}g}"
        tolerance = "–" if c["tolerance"] is None else f"{c['tolerance']:.2g}"
        told = (c["table"], c["cell"], computed, c["reference"], tolerance, c["status"], c["source"])
        lines.append(f"| {' | '.join(told)} |")
    return lines


def _kinds_table(rows: Rows, model: str, kinds: Mapping[str, Mapping[str, float]]) -> list[str]:
    shown = [(t, BLOCK) for t in BY_BLOCK if t != "NF4 double"] + list(ONE_BLOCK.items())
    head = [t if b == BLOCK else f"{t} ({b or 'column'})" for t, b in shown]
    lines = [
        f"| kind | weights | excess kurtosis | peak / RMS | distinct of 32 | {' | '.join(head)} |",
        f"|---|--:|--:|--:|--:|{'--:|' * len(shown)}",
    ]
    for kind, k in kinds.items():
        ratios = " | ".join(f"{100 * find(rows, model, kind, t, b)['norm_ratio']:.3f}" for t, b in shown)
        lines.append(
            f"| {kind} | {k['weights']:,} | {k['kurtosis']:.2f} | {k['peak']:.3f} | {k['distinct']:.1f} | {ratios} |"
        )
    return lines


def plot(workdir: Path, rows: Rows) -> None:
    """Error against bits on normal numbers and on real weights; error by kind of layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "peftax"  # else every run names its parts anew
    data = ("normal", "MiniLM", "Whisper")
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), sharex=True, sharey=True, constrained_layout=True)
    for axis, name in zip(axes, data, strict=True):
        for i, title in enumerate(BY_BLOCK):
            for of, style in (("normal", {"linestyle": ":", "alpha": 0.6}), (name, {"marker": "o", "label": title})):
                kind = "normal" if of == "normal" else "linear"
                points = [r for r in rows if (r["data"], r["kind"], r["format"]) == (of, kind, title)]
                pairs = sorted((r["bits"], 100 * r["norm_ratio"]) for r in points)
                axis.plot(*zip(*pairs, strict=True), color=f"C{i}", **{"markersize": 4, "linewidth": 1.2, **style})
        for i, (title, marker) in enumerate((("Q4_0", "^"), ("Q4_1", "s"))):
            r = find(rows, name, "normal" if name == "normal" else "linear", title, 32)
            axis.plot(r["bits"], 100 * r["norm_ratio"], marker, color=f"C{7 + i}", label=title)
        axis.set(xlabel="bits per weight")
        axis.set_title("N(0, 1)" if name == "normal" else f"{name}, linear layers (dotted: N(0, 1))")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="RMS error / RMS weight, %", yscale="log", yticks=(7, 8, 10, 12, 15, 20))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    _save(figure, workdir / "error_against_bits")

    figure, axes = plt.subplots(1, 2, figsize=(13, 4.2), sharey=True, constrained_layout=True)
    titles = ("NF4", "E2M1", "Int4", "FP4", "E3M0")
    for axis, model in zip(axes, data[1:], strict=True):
        kinds = [r["kind"] for r in rows if (r["data"], r["format"], r["block"]) == (model, "NF4", BLOCK)]
        kinds.sort(key=("linear", samples.EMBEDDING).__contains__)  # what is no kind of linear layer comes last
        for i, title in enumerate(titles):
            color = f"C{BY_BLOCK.index(title)}"
            heights = [100 * find(rows, model, kind, title, BLOCK)["norm_ratio"] for kind in kinds]
            axis.bar(np.arange(len(kinds)) + 0.16 * (i - 2), heights, 0.15, color=color, label=title)
            normal = 100 * find(rows, "normal", "normal", title, BLOCK)["norm_ratio"]
            axis.axhline(normal, color=color, linestyle=":", linewidth=1)
        axis.set_xticks(range(len(kinds)), kinds, rotation=25, ha="right")
        axis.set(title=f"{model}, block {BLOCK} (dotted: N(0, 1))")
    axes[0].set(ylabel="RMS error / RMS weight, %")
    axes[0].legend(fontsize=8, ncols=5)
    _save(figure, workdir / "by_layer_kind")


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    for kind in ("png", "svg"):
        part = path.with_name(f".{path.name}.{kind}")
        figure.savefig(part, dpi=150, format=kind, metadata={"Date": None} if kind == "svg" else {})
        part.replace(path.with_suffix(f".{kind}"))
    plt.close(figure)


if __name__ == "__main__":
    main()
