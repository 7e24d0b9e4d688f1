"""peftax: its own base, adapter, loss and step."""

from __future__ import annotations

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from experiments.speed import side
from peftax import weights
from peftax.train import loss, setup
from peftax.train.step import State, make_step, state_shardings


def batch_of(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """One segment a row; every position counts."""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    ones = np.ones((rows, length), np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": ones.astype(np.float32),
        "positions": ones * np.arange(length, dtype=np.int32),
        "segment_ids": ones,
    }


NF4 = (("_proj/kernel$", {"fmt": "nf4", "group": 64, "double": True}),)


def open_base(args, told) -> setup.Base:
    scan, dtype = bool(args.scan), args.dtype
    if dtype == "nf4":
        return setup.open_base(path=told["base"], scan=scan, remat=args.remat, quantize=NF4)
    return setup.open_base(path=told["base"], scan=scan, remat=args.remat, dtype=dtype, param_dtype=dtype)


def read_tokenizer(args) -> None:
    """Import what reading one imports (torch, where it is installed), before memory is counted."""
    weights.open(side.inputs(args)["base"]).tokenizer()


def trainer(args, told, apply, part):
    """tokens -> loss, with peftax's step. It pins where the state lies, as the training loop does."""

    def objective(apply, params, batch, ctx):
        return loss.causal_lm(apply, params, batch, ctx, chunk=args.chunk)

    optimizer = optax.adamw(told["rate"], weight_decay=0.0)
    state = State.create(part.trainable, optimizer)
    trainable = jax.tree.map(lambda x: x.sharding, part.trainable)
    replicated = NamedSharding(jax.tree.leaves(trainable)[0].mesh, PartitionSpec())
    places = state_shardings(state, trainable, optimizer, replicated)
    state = jax.device_put(state, places)
    step = make_step(apply, objective, optimizer, shardings=places)

    def one(tokens):
        nonlocal state
        state, metrics = step(state, part.frozen, batch_of(tokens))
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return one


def load(args, told):
    run = setup.attach(open_base(args, told), args.inputs / args.adapter)
    return trainer(args, told, run.apply, run.part)


def main() -> None:
    args = side.arguments(scan=1, remat="dots", chunk=128)
    read_tokenizer(args)
    side.serve(args, load)


if __name__ == "__main__":
    main()
