"""A contender: one run, or several learning rates in one program; each step gives the loss of the first."""

from __future__ import annotations

import jax
import numpy as np

from experiments.speed import peftax_side, side
from experiments.speed.inputs import METHOD, RECIPE
from peftax import recipe
from peftax.train import population, programs, setup
from peftax.train.step import State


def load(args, told):
    base = peftax_side.open_base(args, told)
    configs = []
    for rate in np.geomspace(1e-4, 3e-3, args.members):
        method = [(f"method.{key}", str(value)) for key, value in METHOD.items()]
        pairs = [*method, ("optimizer.learning_rate", str(rate)), ("train.chunk", str(args.chunk))]
        configs.append(recipe.load(RECIPE, pairs).to_dict())
    if args.members == 1:
        run = setup.start(base, configs[0]["method"], seed=0)
        program = programs.training(run, configs[0])
        state = jax.device_put(State.create(run.part.trainable, program.optimizer), program.places)

        def one(tokens):
            nonlocal state
            state, metrics = program.step(state, run.part.frozen, peftax_side.batch_of(tokens))
            jax.block_until_ready(state)
            return float(metrics["loss"])

        return one
    members = population.make(base, configs, shared_batch=bool(args.shared))

    def all_of_them(tokens):
        batch = peftax_side.batch_of(tokens)
        if not args.shared:
            batch = {name: np.stack([x] * args.members) for name, x in batch.items()}
        members.state, metrics = members.step(
            members.rates, members.seeds, members.state, members.theta, batch, members.base
        )
        jax.block_until_ready(members.state)
        return float(metrics["loss"][0])

    return all_of_them


def main() -> None:
    args = side.arguments(scan=1, remat="dots", chunk=128, members=1, shared=0)
    peftax_side.read_tokenizer(args)
    side.serve(args, load)


if __name__ == "__main__":
    main()
