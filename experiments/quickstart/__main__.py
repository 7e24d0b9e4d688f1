"""Fine-tune SmolLM2-135M-Instruct on function calling and show whether it got better.

  python -m experiments.quickstart --workdir=runs/quickstart [--seeds=0,1,2]

Three systems answer the same held-out questions about functions that training never saw: the untouched model
told the answer's
format in words, the same with three examples besides, and the fine-tuned one, which is told nothing. Writes
report.md, results.json and curves.png into the workdir, the adapter into seed<N>/adapter.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from rich.console import Console

from peftax import recipe
from peftax.data import chat, function_calling, packing
from peftax.train import evaluate, loop, setup
from peftax.train.generate import Generator, split_prefix

RECIPE = "smollm2_lora"
CONTEXT = 1024
MAX_NEW_TOKENS = 80  # 99% of the wanted answers are shorter; the same for every system


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", default="runs/quickstart")
    parser.add_argument("--seeds", default="0", help="comma-separated; each trains once")
    parser.add_argument("--rows", type=int, help="score only so many test rows (a smoke run)")
    parser.add_argument("--steps", type=int, help="train so many steps instead of the recipe's")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.WARNING)
    console = Console()
    workdir = Path(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    config = recipe.load(RECIPE)
    if args.steps:
        config.train.steps = args.steps

    console.rule("base and data")
    base = setup.open_base(**config.model.to_dict(), mesh=config.mesh.to_dict())
    splits = function_calling.splits()
    test = within_context(base, splits["test"])[: args.rows]
    console.print(f"base: {base.path}")
    console.print({name: f"{len(rows)} rows" for name, rows in splits.items()})

    console.rule("the untouched model")
    systems: dict[str, Any] = {}
    shots = function_calling.pick_shots(splits["train"])
    write = _writer(base, base.model.apply)
    for name, few in (("base, told the format", ()), ("base, 3 examples", shots)):
        systems[name] = answer(base, write, base.params, test, instructed=True, shots=few)
        _tell(console, name, systems[name])
    held_out = test_rows(base, test)
    losses = {"base": evaluate.nll(base.model.apply, base.params, held_out, batch_size=2)}

    tuned = []
    for seed in (int(s) for s in args.seeds.split(",")):
        console.rule(f"fine-tuning, seed {seed}")
        config.train.init_seed = config.data.seed = seed
        folder = workdir / f"seed{seed}"
        loop.train(config.to_dict(), folder, base=base)
        name = f"fine-tuned, seed {seed}"
        run = setup.attach(base, folder / "adapter")
        systems[name] = answer(base, _writer(base, run.apply, run.method.front), run.params, test)
        losses[name] = evaluate.nll(run.apply, run.params, held_out, batch_size=2)
        _tell(console, name, systems[name])
        tuned.append(name)

    console.rule("result")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    facts = {"minutes": (time.perf_counter() - began) / 60, "peak_gib": peak, "test_rows": len(test)}
    text = report(systems, losses, tuned, test, facts)
    (workdir / "report.md").write_text(text)
    (workdir / "results.json").write_text(json.dumps(_figures(systems, losses, facts), indent=1))
    plot(workdir, tuned, losses)
    console.print(text)
    console.print(f"written: {workdir}/report.md, results.json, curves.png, seed*/adapter")


def _writer(base: setup.Base, apply, front: int = 0) -> Generator:
    return Generator(
        apply,
        base.model.init_cache,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_ids=setup.eos_ids(base),
        front=front,
        batch_size=16,
    )


def answer(base, write, params, rows, *, instructed=False, shots=()) -> dict[str, Any]:
    """Score the answers to all rows; what their prompts share is read once."""
    prompts = [
        chat.prompt_ids(function_calling.prompt(r, instructed=instructed, shots=shots), base.tokenizer) for r in rows
    ]
    prefix, rest = split_prefix(prompts)

    def texts(prompts):
        return [base.tokenizer.decode(ids) for ids in write(params, prompts, prefix=prefix)]

    began = time.perf_counter()
    scored = evaluate.function_calls(texts, rest, rows)
    return {**scored, "seconds": time.perf_counter() - began}


def within_context(base: setup.Base, rows) -> list[Any]:
    """The rows that fit the context; a row above it is answered by no system."""
    chats = [function_calling.example(r) for r in rows]
    return [rows[e.row] for e in chat.encode_all(chats, base.tokenizer, length=CONTEXT, split="test")[0]]


def test_rows(base: setup.Base, rows) -> packing.Rows:
    """The examples of the rows, packed."""
    chats = [function_calling.example(r, grouped=True) for r in rows]
    encoded, _ = chat.encode_all(chats, base.tokenizer, length=CONTEXT, split="test")
    return packing.pack(encoded, CONTEXT)


def report(systems, losses, tuned: Sequence[str], rows, facts: Mapping[str, Any]) -> str:
    """The page that says what happened."""
    baselines = [n for n in systems if n not in tuned]
    better = max(baselines, key=lambda n: systems[n]["all"]["match"])
    worst = min(tuned, key=lambda n: systems[n]["all"]["match"])
    lines = [
        "# Function calling with SmolLM2-135M-Instruct",
        "",
        f"{len(rows)} held-out questions about functions that are in no training row. Run on CPU: "
        f"{facts['minutes']:.1f} minutes, peak memory {facts['peak_gib']:.2f} GiB.",
        "",
        "| system | parses % | right function % | full match % | full match %, ≥ 2 tools | seconds |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, s in systems.items():
        many = s.get("2+ tools", {}).get("match", float("nan"))
        rates = " | ".join(f"{100 * s['all'][k]:.1f}" for k in ("parse", "name", "match"))
        lines.append(f"| {name} | {rates} | {100 * many:.1f} | {s['seconds']:.0f} |")
    lines += [
        "",
        f"**{worst}** against **{better}** (the better baseline), paired by question, 95% bootstrap intervals:",
        "",
    ]
    names = (better, worst)
    lines.append(evaluate.markdown(evaluate.compare(systems[better], systems[worst]), names=names))
    lines += ["Loss per token of the right answer, same prompt for both (nothing said of the format):", ""]
    lines.append(evaluate.markdown(evaluate.compare(losses["base"], losses[worst]), names=("base", worst)))
    lines += ["Some answers, in the order of the rows:", ""]
    for i in range(min(4, len(rows))):
        lines += [
            f"- {rows[i]['question'][:200]!r}",
            f"  - wanted: `{function_calling.target(rows[i])}`",
            f"  - {better}: `{systems[better]['texts'][i][:200].strip()}`",
            f"  - {worst}: `{systems[worst]['texts'][i][:200].strip()}`",
        ]
    return "\n".join(lines) + "\n"


def plot(workdir: Path, tuned: Sequence[str], losses) -> None:
    """Training and valid loss of every seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for i, name in enumerate(tuned):
        seed = name.rsplit(" ", 1)[-1]
        lines = [json.loads(x) for x in (workdir / f"seed{seed}" / "metrics.jsonl").read_text().splitlines()]
        train = [(x["step"], x["loss"]) for x in lines if "loss" in x]
        valid = [(x["step"], x["valid_nll"]) for x in lines if "valid_nll" in x]
        axis.plot(*zip(*train, strict=True), color=f"C{i}", alpha=0.3, linewidth=1)
        axis.plot(*zip(*valid, strict=True), color=f"C{i}", marker="o", label=f"valid, seed {seed}")
    axis.axhline(losses["base"]["nll"], color="grey", linestyle=":", label="untouched model, test")
    axis.set(xlabel="step", ylabel="loss per answer token", title="SmolLM2-135M, LoRA, function calling")
    axis.set_yscale("log")
    axis.legend()
    part = workdir / ".curves.png"
    figure.savefig(part, dpi=150, format="png")
    part.replace(workdir / "curves.png")
    plt.close(figure)


def _tell(console: Console, name: str, s: Mapping[str, Any]) -> None:
    rates = "  ".join(f"{k} {100 * s['all'][k]:.1f}%" for k in ("parse", "name", "match"))
    console.print(f"{name}: {rates}  ({s['seconds']:.0f} s)")


def _figures(systems, losses, facts) -> dict[str, Any]:
    keep = ("all", "one tool", "2+ tools", "seconds", "texts", "scores")
    return {
        "facts": dict(facts),
        "systems": {n: {k: s[k] for k in keep if k in s} for n, s in systems.items()},
        "losses": {n: {k: v for k, v in x.items() if k != "per_row"} for n, x in losses.items()},
    }


if __name__ == "__main__":
    main()
