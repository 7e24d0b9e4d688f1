"""Check, time and choose the kernels of packed weights on the device that is here.

  python -m experiments.device --workdir=runs/device [--rows=1,32,2048,8192 --formats=nf4,int4 --write]

For every product: each kernel that takes it against f32 numbers, then timed beside XLA's form and a plain product with
bf16 weights. Then one training step of a small Llama in NF4: the memory that the compiled program says it holds, and
that the device says it took. Writes report.md and results.json into the workdir; with --write also what was
timed into peftax/ops/kernels/tiles, from where dispatch reads it. Without TPU or GPU only XLA's form is there to check.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import tree
from peftax.ops import kernels
from peftax.ops.qtensor import QTensor, dense
from peftax.ops.quantize import quantize

LLAMA = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))  # K, N of Llama-3.1-8B's linear layers
TOLERANCE = 2.0**-7  # of the largest number: bf16 rounds what goes in and what comes out
PLATFORMS = {"gpu": "cuda", "cuda": "cuda", "tpu": "tpu", "cpu": "cpu"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/device"))
    parser.add_argument("--rows", default="1,32,2048,8192", help="rows of x")
    parser.add_argument("--formats", default="nf4,fp4,int4,q4_0,q4_1,int8")
    parser.add_argument("--shapes", default=",".join(f"{k}x{n}" for k, n in LLAMA), help="K x N")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="put the timings into the tables that dispatch reads")
    args = parser.parse_args(argv)
    shapes = [tuple(map(int, s.split("x"))) for s in args.shapes.split(",")]
    args.workdir.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    here = {"device": device.device_kind, "platform": PLATFORMS[device.platform], "jax": jax.__version__}
    results: dict[str, Any] = {**here, "products": [], "memory": memory()}
    rows = list(map(int, args.rows.split(",")))
    for fmt, (k, n), m, transposed in itertools.product(args.formats.split(","), shapes, rows, (False, True)):
        found = product(fmt, k, n, m, transposed, results["platform"], args.repeats)
        results["products"].append(found)
        (args.workdir / "results.json").write_text(json.dumps(results, indent=1))
        (args.workdir / "report.md").write_text(report(results))
    if args.write:
        write(results)
    print((args.workdir / "report.md").read_text())
    wrong = [p for p in results["products"] for x in p["kernels"].values() if x.get("error", 0) > TOLERANCE]
    if wrong:
        raise SystemExit(f"{len(wrong)} products are wrong; the first: {wrong[0]}")


def product(fmt: str, k: int, n: int, m: int, transposed: bool, platform: str, repeats: int) -> dict[str, Any]:
    """One product in every way that takes it: its error, its time, its tiles where it has a choice."""
    w = weight(fmt, k, n)
    x = jax.random.normal(jax.random.key(1), (m, n if transposed else k), jnp.bfloat16)
    numbers = dense(w.astype(jnp.bfloat16))
    plain = partial(_dot, transposed=transposed)
    exact = jax.jit(partial(plain, precision="highest"))(x.astype(jnp.float32), numbers.astype(jnp.float32))
    ways: dict[str, Any] = {"bf16": {"seconds": seconds(plain, x, numbers, repeats)}}
    for name in (name for name, where in kernels.PLATFORM.items() if where in (None, platform)):
        file = importlib.import_module(f"peftax.ops.kernels.{name}")
        why_not = file.supports(w, m, x.dtype, transposed=transposed) if hasattr(file, "supports") else None
        if why_not:
            ways[name] = {"not": why_not}
            continue
        best: dict[str, Any] = {}
        for tiles in candidates(file, w, m, x.dtype, transposed):
            run = jax.jit(partial(file.product, transposed=transposed, **({"tiles": tiles} if tiles else {})))
            try:
                took = seconds(run, x, w, repeats)
            except Exception as error:  # a tile that this compiler does not take is no choice
                best.setdefault("failed", []).append(f"{tiles}: {str(error).splitlines()[0][:200]}")
                continue
            if took < best.get("seconds", np.inf):
                y = np.asarray(run(x, w), np.float32)
                far = float(np.abs(y - np.asarray(exact)).max() / np.abs(np.asarray(exact)).max())
                best |= {"seconds": took, "error": far, "tiles": tiles and tiles._asdict()}
        ways[name] = best
    return {"fmt": fmt, "k": k, "n": n, "m": m, "transposed": transposed, "kernels": ways}


def candidates(file: Any, w: QTensor, m: int, dtype: Any, transposed: bool) -> list[Any]:
    """The tiles to try: the table's, and others near; a kernel without a choice has one way."""
    if not hasattr(file, "choose"):
        return [None]
    first = file.choose(m, w, dtype, transposed=transposed)
    k, n = w.shape
    out_size, inner_size = (k, n) if transposed else (n, k)
    tried = [first]
    near_by = ((size // 2, size, 2 * size) for size in (first.out, first.inner))
    for out, inner in itertools.product(*near_by):
        near = first._replace(out=out, inner=inner)
        if near not in tried and min(out, inner) >= 128 and out_size % out == 0 and inner_size % inner == 0:
            tried.append(near)
    return tried


def weight(fmt: str, k: int, n: int) -> QTensor:
    """Normal numbers in a format, in groups of 64 where it has a choice."""
    group = {"nf4": 64, "fp4": 64, "int4": 64}.get(fmt)
    made = jax.random.normal(jax.random.key(0), (k, n)) / np.sqrt(k)
    return jax.jit(partial(quantize, fmt=fmt, group=group))(made)


def _dot(x: jax.Array, w: jax.Array, *, transposed: bool, precision: Any = None) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (int(transposed),)), ((), ())), precision=precision)


def seconds(run: Callable, x: jax.Array, w: Any, repeats: int) -> float:
    """The median time of one call, from batches of calls that wait for the last alone."""
    run = jax.jit(run)
    jax.block_until_ready(run(x, w))
    took = []
    for _ in range(max(3, repeats // 4)):
        began = time.perf_counter()
        for _ in range(4):
            y = run(x, w)
        jax.block_until_ready(y)
        took.append((time.perf_counter() - began) / 4)
    return statistics.median(took)


def memory() -> dict[str, Any]:
    """A QLoRA step of a small Llama: bytes that the compiled program says it holds, and the device's highest."""
    import optax

    from peftax import methods, models
    from peftax.core import injection, quantization, sites
    from peftax.train import loss
    from peftax.train.step import State, make_step

    config = {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    model = models.build(config, remat="dots")
    shapes = models.abstract(model)
    found = sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    params = jax.tree.map(lambda x: 0.02 * jax.random.normal(jax.random.key(0), x.shape, x.dtype), shapes)
    params = quantization.quantize(params, (("_proj", {"fmt": "nf4", "double": True}),), found)
    method = methods.make("lora", rank=16)
    part = method.init(jax.random.key(0), params, found)
    batch = {name: jnp.ones((4, 512), jnp.int32) for name in ("tokens", "targets", "segment_ids")}
    batch |= {"positions": jnp.tile(jnp.arange(512)[None], (4, 1)), "weights": jnp.ones((4, 512))}
    step = make_step(injection.inject(model.apply, method), partial(loss.causal_lm, chunk=128), optax.adamw(1e-3))
    state = State.create(part.trainable, optax.adamw(1e-3))
    compiled = step.lower(state, part.frozen, batch).compile()
    m = compiled.memory_analysis()
    said = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    _, metrics = compiled(state, part.frozen, batch)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "loss": float(metrics["loss"]),
        "base": tree.nbytes(params),
        "compiled": said,
        "measured": stats.get("peak_bytes_in_use"),
    }


def write(results: Mapping[str, Any]) -> None:
    """Timed tiles go in front of the table's for this kind of device; the quicker kernel becomes its default."""
    folder = Path(kernels.__file__).parent / "tiles"
    totals: dict[str, float] = {}
    for name in kernels.PLATFORM:
        took = [p["kernels"].get(name, {}).get("seconds") for p in results["products"]]
        if took and None not in took:
            totals[name] = sum(took)
    if totals:
        choice = json.loads((folder / "choice.json").read_text())
        choice[results["device"]] = {"kernel": min(totals, key=totals.__getitem__), "source": "timed"}
        (folder / "choice.json").write_text(json.dumps(choice, indent=2) + "\n")
    if results["platform"] == "tpu":
        from peftax.ops.kernels import tpu

        table = json.loads((folder / "tpu.json").read_text())
        entries = []
        for p in sorted(results["products"], key=lambda p: p["m"]):
            tiles = p["kernels"].get("tpu", {}).get("tiles")
            if tiles:
                facts = {key: p[key] for key in ("fmt", "k", "n", "transposed")}
                entries.append({"rows": p["m"], **facts, **tiles, "source": "timed"})
        machine = table[tpu.KINDS[results["device"]]]
        machine["tiles"] = entries + [t for t in machine["tiles"] if t["source"] != "timed"]
        (folder / "tpu.json").write_text(json.dumps(table, indent=2) + "\n")


def report(results: Mapping[str, Any]) -> str:
    names = [*kernels.PLATFORM]
    lines = [
        f"# Kernels of packed weights on {results['device']}",
        "",
        f"Run with jax {results['jax']}. Milliseconds, and in brackets the largest error over the largest number.",
        "",
        f"| format | K x N | rows | | bf16 | {' | '.join(names)} |",
        f"|---|---|--:|---|--:|{'--:|' * len(names)}",
    ]
    for p in results["products"]:
        cells = []
        for name in names:
            x = p["kernels"].get(name)
            if x is None or "seconds" not in x:
                cells.append("" if x is None else x.get("not", "failed"))
            else:
                cells.append(f"{1e3 * x['seconds']:.3f} ({x['error']:.1e})")
        way = "dx" if p["transposed"] else "y"
        plain = f"{1e3 * p['kernels']['bf16']['seconds']:.3f}"
        lines.append(f"| {p['fmt']} | {p['k']}x{p['n']} | {p['m']} | {way} | {plain} | {' | '.join(cells)} |")
    m = results["memory"]
    measured = "this device does not say" if m["measured"] is None else f"{m['measured']:,} bytes"
    lines += ["", f"A QLoRA step of a small Llama: compiled {m['compiled']:,} bytes, measured {measured}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
