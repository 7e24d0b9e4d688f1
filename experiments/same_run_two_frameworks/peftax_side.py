"""peftax: a run from an adapter folder, and what is asked of its outcome."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from experiments.same_run_two_frameworks.inputs import NEW, config_of
from experiments.speed import side
from experiments.speed.peftax_side import batch_of, read_tokenizer
from peftax.core import tree
from peftax.core.method import Partition
from peftax.train import programs, setup
from peftax.train.generate import Generator
from peftax.train.step import State, make_step
from peftax.weights import adapters


class Trainer:
    """Called with tokens [rows, length + 1] it makes a step and gives the loss."""

    def __init__(self, args, told):
        self.config = config_of(told, args.adapter)
        self.base = setup.open_base(path=told["base"])
        self.run = setup.attach(self.base, args.inputs / args.adapter)
        self.program = programs.training(self.run, self.config)
        self.state = State.create(jax.tree.map(jnp.copy, self.run.part.trainable), self.program.optimizer)
        self.state = jax.device_put(self.state, self.program.places)

    def __call__(self, tokens) -> float:
        self.state, metrics = self.program.step(self.state, self.run.part.frozen, batch_of(tokens))
        return float(metrics["loss"])

    def save(self, into: str) -> None:
        _save(self.run, self.state.trainable, into)

    def gradients(self, folder: str, batch: list, into: str) -> None:
        """At the adapter of a folder, written as one."""
        run, rule = setup.attach(self.base, folder), optax.trace(0.0)  # which keeps what it is given
        step = make_step(run.apply, optimizer=rule, **programs.of_step(run, self.config))
        state = State.create(jax.tree.map(jnp.copy, run.part.trainable), rule)
        state, _ = step(state, run.part.frozen, batch_of(jnp.asarray(batch)))
        _save(run, state.opt_state.trace, into)

    def generate(self, folder: str, prompts: list[list[int]]) -> list[list[int]]:
        """Greedy, with the adapter of a folder."""
        run = setup.attach(self.base, folder)
        write = Generator(run.apply, self.base.model.init_cache, max_new_tokens=NEW, eos_ids=setup.eos_ids(self.base))
        return write(tree.merge(*run.part), prompts)


def _save(run: setup.Run, trainable, into: str) -> None:
    adapters.save(Path(into), Partition(run.part.frozen, trainable), run.method, run.base.sites, extra=run.raw)


def main() -> None:
    args = side.arguments()
    read_tokenizer(args)
    side.serve(args, Trainer)


if __name__ == "__main__":
    main()
