"""What both libraries read: tokens, adapter folders, the base's path.

python -m experiments.mixed_batch.inputs FOLDER --targets=all [--base BASE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.mixed_batch.cases import ADAPTERS, BATCH, RANKS, TARGETS
from peftax import recipe
from peftax.core import tree
from peftax.methods.lora import lora
from peftax.train import setup
from peftax.weights import adapters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--targets", choices=TARGETS, required=True)
    parser.add_argument("--base", help="a Hugging Face folder; default: the quickstart's")
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    base = setup.open_base(path=args.base or recipe.load("smollm2_lora").model.path)
    args.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, base.config["vocab_size"], (BATCH, args.length)).astype(np.int32)
    np.save(args.folder / "tokens.npy", ids)
    every, _ = TARGETS[args.targets]
    for i in range(ADAPTERS):
        method = lora(rank=RANKS[i % len(RANKS)], targets=every[i % len(every)])
        part = method.init(jax.random.key(i), base.params, base.sites)
        flat = {
            path: x if path.endswith("/a") else jnp.asarray(rng.normal(0, 0.01, x.shape), jnp.float32)
            for path, x in tree.flatten(part.trainable).items()
        }
        part = part._replace(trainable=tree.unflatten(flat))
        adapters.save(args.folder / f"adapter{i}", part, method, base.sites)
    (args.folder / "inputs.json").write_text(json.dumps({"base": str(base.path)}))


if __name__ == "__main__":
    main()
