"""The programs of a run: jitted functions, and the shapes and places of what they take.

A run executes them; a planner compiles them for machines that are not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from peftax import sharding
from peftax.train import loss, optimizers, setup
from peftax.train.step import State, make_step, state_shardings


@dataclasses.dataclass(frozen=True)
class Training:
    """The step of a config, and what goes into it.

    step:   (state, frozen, batch) -> (state, metrics), jitted.
    state:  its shapes, each with its place.
    rows:   where a batch lies.
    """

    step: Callable
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    state: State
    rows: NamedSharding

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

    def objective(apply, params, batch, ctx):
        return loss.causal_lm(apply, params, batch, ctx, chunk=c["chunk"])

    penalty = run.method.penalty
    step = make_step(
        run.apply,
        objective,
        optimizer,
        accumulate=c["accumulate"],
        dropout_seed=c["dropout_seed"] if setup.drops(config["method"]) else None,
        penalty=None if penalty is None else lambda params: penalty(params, run.base.sites),
        shardings=places,
    )
    lead = (None,) if c["accumulate"] > 1 else ()
    rows = NamedSharding(run.base.mesh, PartitionSpec(*lead, *sharding.BATCH))
    return Training(step, optimizer, schedule, placed(state, places), rows)


def placed(shapes: Any, places: Any) -> Any:
    """Shapes that know where they lie."""
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places)
