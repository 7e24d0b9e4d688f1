"""What every contender reads: token batches of real training text, an initial adapter, the base's path.

python -m experiments.speed.inputs FOLDER [--base BASE --rows=4 --length=256 --steps=20 --methods=lora]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from peftax import recipe
from peftax.train import setup
from peftax.weights import adapters

RECIPE = "smollm2_lora"
METHOD = {"name": "lora", "rank": 16, "alpha": 32.0, "targets": "all-linear"}
RATE = 1e-3  # AdamW, constant, no weight decay, no clipping; b1, b2, eps as both libraries have them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", help="a Hugging Face folder; default: the quickstart's")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--methods", default="lora", help="an adapter folder each: adapter_NAME, of lora adapter")
    args = parser.parse_args()
    base = setup.open_base(path=args.base or recipe.load(RECIPE).model.path)
    shape = (args.steps, args.rows, args.length + 1)  # one token more: every position has a target
    if base.tokenizer is None:
        tokens = np.random.default_rng(0).integers(0, base.config["vocab_size"], shape)
    else:
        encoded = setup.examples(base, "train", length=1024, policy="drop", task="function_calling")
        stream = np.concatenate([e.tokens for e in encoded])
        tokens = np.resize(stream, shape)  # from the start again where the text is too short
    args.folder.mkdir(parents=True, exist_ok=True)
    np.save(args.folder / "tokens.npy", tokens.astype(np.int32))
    for name in args.methods.split(","):
        run = setup.start(base, {**METHOD, "name": name}, seed=0)
        folder = "adapter" if name == METHOD["name"] else f"adapter_{name}"
        adapters.save(args.folder / folder, run.part, run.method, base.sites)
    (args.folder / "inputs.json").write_text(json.dumps({"base": str(base.path), "rate": RATE}))


if __name__ == "__main__":
    main()
