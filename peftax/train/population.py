"""Runs that differ in learning rate, seeds, alpha or rank, trained in one program: their trainable halves lie side by
side in front of one frozen base, which each step reads once.

A member is a run of its own: its gradients and losses are those of the single run (tests/train/population_test.py), its
folder holds what that run's would, but for the checkpoints, which are the population's, and TensorBoard's files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from peftax import methods, recipe, weights
from peftax.core import tree
from peftax.core.method import Partition
from peftax.train import evaluate, loop, memory, optimizers, programs, setup, writers
from peftax.train.step import State, plain_step
from peftax.weights.checkpoint import Checkpoints

CPU_TOKENS = 512  # that meet the base at once there: more are no quicker, and leave the caches
CPU_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}  # else moments are copied, then changed in place

FREE = {  # keys of a config in which members may differ, and ranks: see `fixed`
    "optimizer.learning_rate",
    "method.alpha",
    "data.seed",
    "train.init_seed",
    "train.dropout_seed",
}
OF_THE_BASE = ("pissa", "pissa_fast", "olora", "eva", "loftq")  # starts that move it, or look at what it is given


def fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What members have to have in common, by dotted key; ranks too where zeros behind them would not stay zeros."""
    method = config["method"]
    free = FREE | ({"method.rank"} if "rank" in method and methods.make(method["name"]).pads else set())
    return {key: value for key, value in recipe.flat(config).items() if key not in free}


def together(configs: Sequence[Mapping[str, Any]]) -> str | None:
    """Why these configs cannot train in one program; None if they can."""
    first, *others = map(fixed, configs)
    for other in others:
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                return f"they differ in {key}: {first.get(key)!r} and {other.get(key)!r}"
    for key, value in first.items():
        if re.fullmatch(r"method\.(.+\.)?init", key) and value in OF_THE_BASE:
            return f"init {value!r} moves or looks at the base, which they share"
    if first["warm_start"]:
        return "they start from an adapter"
    return None


@dataclasses.dataclass
class Population:
    """Members on one base.

    runs:   each by itself, in shapes, its own rank's.
    base:   what is frozen of the base: they share it.
    state:  their states, stacked; leaves of unlike rank padded with zeros.
    theta:  their frozen leaves that are not the base's, stacked.
    rates:  learning rates; seeds: of dropout.
    step:   (rates, seeds, state, theta, batch, base) -> (state, metrics), each metric with a value a member.
    """

    runs: list[setup.Run]
    base: dict[str, Any]
    state: State
    theta: dict[str, Any]
    rates: jax.Array
    seeds: jax.Array
    step: Any

    def member(self, i: int) -> setup.Run:
        """A member's run as it stands, without padding."""
        run, own, mine = self.runs[i], tree.flatten(self.base), tree.flatten(self.params(i))

        def half(shapes: dict[str, Any]) -> dict[str, Any]:
            flat = tree.flatten(shapes)
            return tree.unflatten(
                {p: mine[p][tuple(map(slice, x.shape))] for p, x in flat.items() if p not in own}
                | {p: own[p] for p in flat if p in own}
            )

        return dataclasses.replace(run, part=Partition(half(run.part.frozen), half(run.part.trainable)))

    def params(self, i: int) -> dict[str, Any]:
        """The whole tree with a member's leaves, padded: all members' have one shape, and so one program."""
        halves = (jax.tree.map(lambda x: x[i], half) for half in (self.theta, self.state.trainable))
        return tree.merge(self.base, *halves)


def make(base: setup.Base, configs: Sequence[Mapping[str, Any]], *, shared_batch: bool = False) -> Population:
    """The members at their starts; as `sketch`."""
    outline = sketch(base, configs, shared_batch=shared_batch)
    parts = [
        setup.start(base, m["method"], seed=m["train"]["init_seed"], method=run.method).part
        for m, run in zip(configs, outline.runs, strict=True)
    ]
    theta = [_split(part.frozen, base)[1] for part in parts]
    state = _states(outline.runs[0], configs[0], outline.rates, [part.trainable for part in parts])
    at = jax.tree.map(lambda x: x.sharding, (outline.state, outline.theta))
    state, theta = jax.device_put((state, stack(theta)), at)
    return dataclasses.replace(outline, base=_split(parts[0].frozen, base)[0], state=state, theta=theta)


def sketch(base: setup.Base, configs: Sequence[Mapping[str, Any]], *, shared_batch: bool = False) -> Population:
    """`make` in shapes, each with its place: nothing is read or computed, the base may be an outline.

    Args:
      shared_batch: all members see the same batch, [B, T]; else each its own, [members, B, T].

    Raises ValueError where they cannot train in one program, and says why.
    """
    if why := together(configs):
        raise ValueError(f"a population: {why}; run these members by themselves")
    config = configs[0]
    unlike = {json.dumps(m["method"]): m["method"] for m in configs}  # a thousand members may have one method
    sketches = {key: setup.sketch(base, method) for key, method in unlike.items()}
    runs = [sketches[json.dumps(m["method"])] for m in configs]
    run, method = runs[0], runs[0].method
    if method.move is not None:
        raise ValueError(f"a population: {method.name} moves the base; run these members by themselves")
    of_step = programs.of_step(run, config)
    drops = of_step.pop("dropout_seed") is not None

    def one(rate, seed, state, theta, batch, frozen):
        optimizer, own_seed = _optimizer(run, config, rate), seed if drops else None
        step = plain_step(run.apply, optimizer=optimizer, dropout_seed=own_seed, **of_step)
        return step(state, tree.merge(frozen, theta), batch)

    axes = (0, 0, 0, 0, None if shared_batch else 0, None)
    rates = jnp.asarray([m["optimizer"]["learning_rate"] for m in configs], jnp.float32)
    seeds = jnp.asarray([m["train"]["dropout_seed"] for m in configs], jnp.uint32)
    frozen, own = _split(run.part.frozen, base)
    trainable = [r.part.trainable for r in runs]
    state = jax.eval_shape(functools.partial(_states, run, config), rates, trainable)
    theta = jax.eval_shape(stack, [_split(r.part.frozen, base)[1] for r in runs])
    places = _in_front(programs.training(run, config).places)
    options = CPU_OPTIONS if _on_cpu(base) else None
    turns = _in_turn(one, axes, len(runs), _most(base))
    step = jax.jit(turns, donate_argnums=2, out_shardings=(places, None), compiler_options=options)
    return Population(
        runs,
        programs.placed(frozen, base.places(frozen, method)),
        programs.placed(state, places),
        programs.placed(theta, _in_front(base.places(own, method))),
        rates,
        seeds,
        step,
    )


def check_memory(base: setup.Base, configs: Sequence[Mapping[str, Any]]) -> memory.Need:
    """The estimate, from shapes; MemoryError where the devices have less. All are padded to the largest's shapes."""
    largest = max(configs, key=lambda m: m["method"].get("rank") or 0)
    c, data = largest["train"], largest["data"]
    tokens = c["accumulate"] * c["batch_size"] * (data["train_length"] or data["length"])
    together = functools.partial(_at_once, tokens=tokens, most=_most(base))
    return memory.check(setup.sketch(base, largest["method"]), largest, members=len(configs), at_once=together)


def program(base: setup.Base, configs: Sequence[Mapping[str, Any]]) -> programs.Program:
    """The step of members that each see their own batch, for a planner; `base` may be an outline."""
    found, c, data = sketch(base, configs), configs[0]["train"], configs[0]["data"]
    made = programs.training(found.runs[0], configs[0])
    rows = programs.batch(c["batch_size"], data["train_length"] or data["length"], made.lies, c["accumulate"])
    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(configs), *x.shape), x.dtype), rows)
    batch = programs.placed(many, _in_front(jax.tree.map(lambda x: x.sharding, rows)))
    whole = NamedSharding(base.mesh, PartitionSpec())
    numbers = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in (found.rates, found.seeds))
    args = (*numbers, found.state, found.theta, batch, found.base)
    return programs.Program(found.step, args, found.state, tree.merge(found.base, found.theta))


def _at_once(members: int, tokens: int, most: float) -> int:
    """How many members, each with so many tokens, compute together; the others take their turns."""
    return max(n for n in range(1, members + 1) if members % n == 0 and (n == 1 or n * tokens <= most))


def _most(base: setup.Base) -> float:
    """How many tokens meet the base at once."""
    return CPU_TOKENS if _on_cpu(base) else math.inf


def _on_cpu(base: setup.Base) -> bool:
    return base.mesh.devices.flat[0].platform == "cpu"


def _in_turn(one: Any, axes: Sequence[int | None], members: int, most: float) -> Any:
    """The step of one member as one of all: together those whose tokens are `most` at most, one group after another.

    States change in place.
    """
    some = jax.vmap(one, axes)

    def step(rates, seeds, state, theta, batch, frozen):
        shared = axes[4] is None
        count = _at_once(members, batch["tokens"].size // (1 if shared else members), most)
        if count == members:
            return some(rates, seeds, state, theta, batch, frozen)

        def group(state, at):
            def of(tree):
                return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, count), tree)

            after, metrics = some(*of((rates, seeds, state, theta)), batch if shared else of(batch), frozen)
            state = jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, at, 0), state, after)
            return state, metrics

        state, metrics = jax.lax.scan(group, state, jnp.arange(0, members, count))
        return state, jax.tree.map(lambda x: x.reshape(members, *x.shape[2:]), metrics)

    return step


def _states(run: setup.Run, config: Mapping[str, Any], rates: jax.Array, trainable: Sequence[Any]) -> State:
    """The members' first states, stacked."""
    return jax.vmap(lambda rate, t: State.create(t, _optimizer(run, config, rate)))(rates, stack(trainable))


def _optimizer(run: setup.Run, config: Mapping[str, Any], rate: jax.Array) -> optax.GradientTransformation:
    settings = {**config["optimizer"], "learning_rate": rate}
    steps = config["train"]["steps"]
    return optimizers.from_config(settings, steps=steps, method=run.method, sites=run.base.sites)[0]


def _split(frozen: Mapping[str, Any], base: setup.Base) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is frozen of the base, and of the method."""
    own = tree.flatten(base.params)
    halves = ({p: x for p, x in tree.flatten(frozen).items() if (p in own) == of_base} for of_base in (True, False))
    return tuple(map(tree.unflatten, halves))


def _in_front(places: Any) -> Any:
    """Where members lie: each as it would by itself, all of them on every device."""
    return jax.tree.map(lambda at: NamedSharding(at.mesh, PartitionSpec(None, *at.spec)), places)


def stack(trees: Sequence[Any]) -> Any:
    """Trees of one structure as one, members in front; zeros behind what is shorter."""

    def stacked(*leaves):
        shape = tuple(max(n) for n in zip(*(jnp.shape(x) for x in leaves), strict=True))
        return jnp.stack([jnp.zeros(shape, x.dtype).at[tuple(map(slice, jnp.shape(x)))].set(x) for x in leaves])

    return jax.tree.map(stacked, *trees)


def train(
    configs: Sequence[Mapping[str, Any]], folders: Sequence[str | Path], workdir: str | Path
) -> list[dict[str, Any] | None]:
    """Train members to their ends, or go on; each folder gets what `loop.train` writes of a run, but checkpoints and
    TensorBoard's files.

    A member whose loss is no longer a number stands still, and its folder says so in error.txt; the others go on.

    Args:
      configs, folders: of each member.
      workdir: of the population: its checkpoints.

    Returns:
      what loop.train returns, for each member; None where it failed, or where all were told to stop.
    """
    folders, c = [Path(f) for f in folders], configs[0]["train"]
    for config, folder in zip(configs, folders, strict=True):
        setup.check_numbers(config)
        loop.claimed(folder, config)
    base = setup.outline(**configs[0]["model"], mesh=configs[0]["mesh"])
    setup.check_mesh(base, configs[0], setup.make_method(base, configs[0]["method"]))
    if c["check_memory"]:
        check_memory(base, configs)
    base = base.load()
    orders = [m["data"]["seed"] for m in configs]
    streams = {
        seed: setup.train_batches(base, m["data"], batch_size=c["batch_size"], accumulate=c["accumulate"])
        for seed, m in dict(zip(orders, configs, strict=True)).items()
    }
    shared = len(streams) == 1
    starts = [json.dumps([m["method"], m["train"]["init_seed"]]) for m in configs]  # alike, they score alike
    valid = setup.valid_rows(base, configs[0]["data"])
    population = make(base, configs, shared_batch=shared)
    fingerprint = weights.fingerprint(base.params)
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", keep=c["keep"])
    start, facts = 0, {"best": [None] * len(configs), "failed": [None] * len(configs)}
    if (found := checkpoints.restore({"state": population.state}, base=fingerprint)) is not None:
        start, arrays, facts = found
        population.state = arrays["state"]
        for seed, position in zip(orders, facts["data"], strict=True):
            streams[seed].set_state(position)
    for config, folder in zip(configs, folders, strict=True):
        loop.claim(folder, config)
    schedules = [
        optimizers.from_config(m["optimizer"], steps=c["steps"], method=r.method, sites=base.sites)[1]
        for m, r in zip(configs, population.runs, strict=True)
    ]
    last: list[dict[str, float]] = [{} for _ in configs]
    with ExitStack() as open_files, closing(checkpoints), loop.Stop() as stop:
        metrics_to, timings_to = (
            [open_files.enter_context(closing(writers.Jsonl(f / name, resume_step=start))) for f in folders]
            for name in ("metrics.jsonl", "timings.jsonl")
        )

        def look(step: int) -> None:
            scores: dict[str, dict[str, Any]] = {}
            for i, to in enumerate(metrics_to):
                if facts["failed"][i]:
                    continue
                score = None
                if valid is not None:
                    alike = starts[i] if step == 0 else str(i)
                    if alike not in scores:
                        apply, params = population.runs[0].apply, population.params(i)
                        scores[alike] = evaluate.nll(apply, params, valid, hits=bool(base.labels))
                    to.write(step, evaluate.valid(scores[alike]))
                    score = scores[alike]["nll"]
                best = facts["best"][i]
                if score is None or best is None or score < best[1]:
                    facts["best"][i] = [step, score]
                    population.member(i).save(folders[i] / "adapter", base=str(base.path))

        if start == 0 and (valid is not None or c["steps"] == 0):
            look(0)
        for step in range(start + 1, c["steps"] + 1):
            began = time.perf_counter()
            drawn = {seed: next(stream) for seed, stream in streams.items()}
            rows = [drawn[seed] for seed in orders]
            batch = rows[0] if shared else {k: np.stack([r[k] for r in rows]) for k in rows[0]}
            population.state, metrics = population.step(
                population.rates, population.seeds, population.state, population.theta, batch, population.base
            )
            metrics = jax.device_get(metrics)
            seconds = (time.perf_counter() - began) / len(configs)  # a member's share
            tokens = math.prod(rows[0]["tokens"].shape)
            for i in range(len(configs)):
                if facts["failed"][i]:
                    continue
                now = {k: float(v[i]) for k, v in metrics.items()}
                if not now.pop("finite"):
                    what = f"step {step}: loss {now['loss']} or gradient norm {now['grad_norm']} is not finite"
                    facts["failed"][i] = what
                    _fail(folders[i], what)
                    continue
                last[i] = now
                if step % c["log_every"] == 0 or step == c["steps"]:
                    metrics_to[i].write(step, {**now, "learning_rate": float(schedules[i](step - 1))})
                    timings_to[i].write(step, {"seconds": seconds, "tokens_per_second": tokens / seconds})
            if step % c["eval_every"] == 0 or step == c["steps"]:
                look(step)
            stopping = stop.asked() and step < c["steps"]
            if step % c["save_every"] == 0 or step == c["steps"] or stopping:
                facts.update(data=[streams[seed].get_state() for seed in orders], base=fingerprint)
                facts["loss"] = [x.get("loss") for x in last]
                checkpoints.save(step, {"state": population.state}, facts)
            if stopping:
                logging.warning("stopped by a signal after step %d; run the same command to go on", step)
                return [None] * len(configs)
    done = []
    for i, folder in enumerate(folders):
        if facts["failed"][i]:
            _fail(folder, facts["failed"][i])  # again, where it was told to try once more and stands where it stood
            done.append(None)
            continue
        best, losses = facts["best"][i], facts.get("loss") or [None] * len(folders)  # saved with the last step
        counted = loop.trainable(population.runs[i])
        done.append(
            {"trainable": counted, "step": c["steps"], "loss": losses[i], "valid": best[1], "best": best}
            | {"adapter": str(folder / "adapter")}
        )
    return done


def _fail(folder: Path, what: str) -> None:
    (folder / "error.txt").write_text(f"FloatingPointError: {what}\n")
