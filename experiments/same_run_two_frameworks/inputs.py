"""What both sides read: batches of training text, an adapter for each method, and how it trains.

python -m experiments.same_run_two_frameworks.inputs FOLDER [--base=BASE --methods=lora,oft --steps=200]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftax import recipe
from peftax.train import setup
from peftax.weights import adapters

RECIPE = "smollm2_lora"
METHODS = {
    "lora": {"rank": 16, "alpha": 32.0},
    "dora": {"rank": 16, "alpha": 32.0},
    "oft": {"block_size": 32},
    # the budget begins to shrink after a tenth of the steps and has shrunk with three tenths left
    "adalora": {"rank": 12, "target_rank": 8, "alpha": 16.0, "first_steps": 0.1, "final_steps": 0.3, "every": 10},
}
# AdamW, constant, no weight decay, no clipping; b1, b2, eps as both libraries have them. At 1e-3 OFT's loss leaps, in
# either framework and in each elsewhere: 1e-4 is what PEFT's own run has.
RATES = {"lora": 1e-3, "dora": 1e-3, "oft": 1e-4, "adalora": 1e-3}
NEW = 48  # tokens that an answer is continued by
QUESTIONS = 4


def settings(name: str, steps: int) -> dict[str, Any]:
    """`config.method` of a run of so many steps."""
    own = {"name": name, "targets": "all-linear", **METHODS[name]}
    if name == "adalora":
        own |= {"total_steps": steps, **{key: round(own[key] * steps) for key in ("first_steps", "final_steps")}}
    return own


def config_of(told: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config of a run: what both sides' optimizers do."""
    config = recipe.load(RECIPE).to_dict()
    optimizer = {"learning_rate": RATES[name], "schedule": "constant", "warmup_steps": 0, "clip": None}
    config["optimizer"] |= optimizer
    config["train"] |= {"steps": told["steps"]}
    return {**config, "method": settings(name, told["steps"])}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", help="a Hugging Face folder; default: the quickstart's")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)
    base = setup.open_base(path=args.base or recipe.load(RECIPE).model.path)
    options = dict(length=1024, policy="drop", task="function_calling")
    stream = np.concatenate([e.tokens for e in setup.examples(base, "train", **options)])
    tokens = np.resize(stream, (args.steps, args.rows, args.length + 1)).astype(np.int32)
    questions = []
    for each in setup.examples(base, "valid", **options, limit=QUESTIONS):
        questions.append([int(t) for t in each.tokens[: int(np.argmax(each.weights))]])  # up to the answer
    args.folder.mkdir(parents=True, exist_ok=True)
    np.save(args.folder / "tokens.npy", tokens)
    for name in args.methods.split(","):
        run = setup.start(base, settings(name, args.steps), seed=0)
        adapters.save(args.folder / name, run.part, run.method, base.sites)
    told = {"base": str(base.path), "steps": args.steps, "questions": questions}
    (args.folder / "inputs.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
