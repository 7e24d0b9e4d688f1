"""The programs of a run: jitted functions, and the shapes and places of what they take.

A run executes them; a planner compiles them for machines that are not here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from peftax import sharding
from peftax.core import folding, tree
from peftax.train import evaluate, loss, optimizers, setup
from peftax.train.step import State, make_step, state_shardings


@dataclasses.dataclass(frozen=True)
class Training:
    """The step of a config, and what goes into it.

    step:   (state, frozen, batch) -> (state, metrics), jitted.
    state:  its shapes, each with its place.
    lies:   the shape of an array of a batch -> where it lies.
    """

    step: Callable
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    state: State
    lies: Callable[[tuple[int, ...]], NamedSharding]

    @property
    def places(self) -> State:
        return jax.tree.map(lambda x: x.sharding, self.state)


def training(run: setup.Run, config: Mapping[str, Any]) -> Training:
    """The training step of a config; `run` may be a sketch."""
    c = config["train"]
    optimizer, schedule = optimizers.from_config(
        config["optimizer"], steps=c["steps"], method=run.method, sites=run.base.sites
    )
    state = jax.eval_shape(lambda t: State.create(t, optimizer), run.part.trainable)
    trainable = run.base.places(run.part.trainable, run.method)
    places = state_shardings(state, trainable, optimizer, NamedSharding(run.base.mesh, PartitionSpec()))

    step = make_step(run.apply, optimizer=optimizer, shardings=places, **of_step(run, config))
    lies = functools.partial(sharding.of_batch, mesh=run.base.mesh, parts=c["accumulate"] > 1)
    return Training(step, optimizer, schedule, placed(state, places), lies)


def of_step(run: setup.Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a step takes of a config, as `plain_step` has it: loss, accumulate, dropout_seed, penalty."""
    c, penalty = config["train"], run.method.penalty
    return {
        "loss": functools.partial(loss.causal_lm, chunk=c["chunk"]),
        "accumulate": c["accumulate"],
        "dropout_seed": c["dropout_seed"] if setup.drops(config["method"]) else None,
        "penalty": None if penalty is None else lambda params: penalty(params, run.base.sites),
    }


def placed(shapes: Any, places: Any) -> Any:
    """Shapes that know where they lie."""
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places)


class Program(NamedTuple):
    """A jitted function and the shapes of its arguments, each with its place; of a step its state and frozen half."""

    run: Callable
    args: tuple[Any, ...]
    state: State | None = None
    frozen: Any = None


NAMES = ("init", "step", "evaluate", "merge")


def every(
    run: setup.Run, config: Mapping[str, Any], made: Training | None = None, only: Sequence[str] = ()
) -> dict[str, Program]:
    """The programs of a config, by name; merge where the method folds.

    Args:
      run: a sketch.
      made: its training, where that is known already.
      only: of NAMES; by default all.
    """
    made, base = training(run, config) if made is None else made, run.base
    if wrong := set(only) - set(NAMES):
        raise ValueError(f"programs: {sorted(wrong)[0]!r} is none of {', '.join(NAMES)}")
    whole = NamedSharding(base.mesh, PartitionSpec())
    frozen, trainable = (placed(half, base.places(half, run.method)) for half in run.part)
    params = tree.merge(frozen, trainable)
    c, data = config["train"], config["data"]
    parts = math.prod(base.mesh.shape[a] for a in jax.tree.leaves(tuple(sharding.BATCH)[:1]))
    length = data["train_length"] or data["length"]
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    own = tree.flatten(base.params)
    fresh = {path: x.sharding for path, x in tree.flatten(params).items() if path not in own}

    def init():
        def run_init(key, params):
            part = run.method.init(key, params, base.sites)
            return {path: x for path, x in tree.flatten(tree.merge(*part)).items() if path in fresh}

        return Program(jax.jit(run_init, out_shardings=fresh, keep_unused=True), (key, base.params))

    def step():
        rows = batch(c["batch_size"], length, made.lies, c["accumulate"])
        return Program(made.step, (made.state, frozen, rows), made.state, frozen)

    def score():
        lies = functools.partial(sharding.of_batch, mesh=base.mesh)
        losses = functools.partial(loss.token_losses, run.apply, chunk=c["chunk"])
        return Program(jax.jit(losses), (params, batch(evaluate.together(parts), data["length"], lies)))

    def merge():  # `peftax merge` runs one such program after another
        fold, leaves = folding.largest(run.method, params, base.sites)
        return Program(jax.jit(fold), (leaves,))

    makers = dict(zip(NAMES, (init, step, score, merge), strict=True))
    if run.method.fold is None:
        del makers["merge"]
    return {name: make() for name, make in makers.items() if not only or name in only}


def batch(
    rows: int, length: int, lies: Callable[[tuple[int, ...]], NamedSharding], accumulate: int = 1
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch."""
    shape = (accumulate, rows, length) if accumulate > 1 else (rows, length)
    kinds = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32) | {"weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct(shape, kind, sharding=lies(shape)) for name, kind in kinds.items()}
