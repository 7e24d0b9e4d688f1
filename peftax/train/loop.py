"""The training run, read from top to bottom."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from peftax import processes, weights
from peftax.core import quantization, tree
from peftax.core import sites as core_sites
from peftax.train import evaluate, memory, programs, setup, writers
from peftax.train.step import State
from peftax.weights import source
from peftax.weights.checkpoint import Checkpoints

CALIBRATION = "calibration.json"  # config.method as a start made from data would have it


def train(config: Mapping[str, Any], workdir: str | Path, *, base: setup.Base | None = None) -> dict[str, Any]:
    """Run a config in a folder, or go on where that folder's run stopped.

    The folder holds config.json, metrics.jsonl, timings.jsonl, checkpoints/ and adapter/: the best on valid,
    or the last. Of several processes all call this with one folder that all of them see; the first writes what is
    written once.

    Returns:
      {"trainable", "step", "loss", "valid", "best", "adapter"}.
    """
    workdir = Path(workdir)
    config = dict(config)
    setup.check_numbers(config)
    there = claimed(workdir, config)
    c = config["train"]

    # --- model, method, data ----------------------------------------------------------------------
    base = base or setup.outline(**config["model"], mesh=config["mesh"])
    setup.check_mesh(base, config, setup.make_method(base, config["method"]))
    batches = setup.train_batches(base, config["data"], batch_size=c["batch_size"], accumulate=c["accumulate"])
    valid = setup.valid_rows(base, config["data"])
    run = setup.sketch(base, config["method"])
    if c["check_memory"]:
        memory.check(run, config)
    base = base.load()
    settings, data_start = _calibrated(base, config, batches, workdir / CALIBRATION)
    if settings != config["method"]:
        run = setup.sketch(base, settings)
    show(run)

    # --- optimizer and step -----------------------------------------------------------------------
    program = programs.training(run, config)

    # --- begin, or go on ------------------------------------------------------------------------
    fingerprint = weights.fingerprint(base.params)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=c["keep"])
    theta = _not_base(run)
    theta_places = tree.flatten(base.places(tree.unflatten(theta), run.method))
    like = {"state": program.state, "frozen": programs.placed(theta, theta_places)}
    if (found := checkpoints.restore(like, base=fingerprint)) is not None:
        start, arrays, facts = found
        state = arrays["state"]
        run = setup.resume(base, run, state.trainable, arrays["frozen"])
        batches.set_state(facts["data"])
        logging.info("going on from step %d of %s", start, workdir)
    else:
        start, facts = 0, {"best": None}
        data_start = data_start or setup.calibrate(base, config, batches)  # killed before its first checkpoint
        run = setup.start(base, settings, seed=c["init_seed"], warm_start=config["warm_start"], found=data_start)
        state = processes.put(State.create(run.part.trainable, program.optimizer), program.places)
    frozen, frozen_theta = run.part.frozen, _not_base(run)

    writes = processes.first()
    if writes and not there:
        claim(workdir, config)
    if writes and data_start is not None:
        source.write_json(workdir / CALIBRATION, settings)
    for half_written in workdir.glob(".adapter.*") if writes else ():  # by a process that was killed
        shutil.rmtree(half_written, ignore_errors=True)
    metrics_to, timings_to = writers.All(), writers.All()
    if writes:
        metrics_to.add(writers.Jsonl(workdir / "metrics.jsonl", resume_step=start))
        timings_to.add(writers.Jsonl(workdir / "timings.jsonl", resume_step=start))
    if writes and c["tensorboard"]:
        metrics_to.add(writers.TensorBoard(workdir / "tensorboard", resume_step=start))

    def look(step: int) -> None:
        """Score valid; keep the adapter when it is the best so far, or when there is no valid to choose by."""
        if valid is not None:
            params = tree.merge(frozen, state.trainable)
            found = evaluate.nll(run.apply, params, valid, hits=bool(base.labels), at=base.rows)
            metrics_to.write(step, evaluate.valid(found))
            facts["valid"] = found["nll"]
        if valid is None or facts["best"] is None or facts["valid"] < facts["best"][1]:
            facts["best"] = [step, facts.get("valid")]
            best = dataclasses.replace(run, part=run.part._replace(trainable=state.trainable))
            best.save(workdir / "adapter", base=str(base.path))

    def save(step: int) -> None:
        facts.update(data=batches.get_state(), base=fingerprint, loss=last.get("loss"))
        checkpoints.save(step, {"state": state, "frozen": frozen_theta}, facts)

    # --- steps ------------------------------------------------------------------------------------
    stop = Stop()
    last: dict[str, float] = {}
    with closing(metrics_to), closing(timings_to), closing(checkpoints), _progress() as progress, stop:
        if start == 0 and (valid is not None or c["steps"] == 0):
            look(0)
        bar = progress.add_task("train", total=c["steps"], completed=start, loss=math.nan, valid=math.nan)
        for step in range(start + 1, c["steps"] + 1):
            began = time.perf_counter()
            position = batches.get_state()["next"]
            batch = batches.place(program.lies)
            state, metrics = program.step(state, frozen, batch)
            last = {k: float(v) for k, v in jax.device_get(metrics).items()}
            if not last.pop("finite"):
                raise FloatingPointError(
                    f"step {step}: loss {last['loss']} or gradient norm {last['grad_norm']} is not finite "
                    f"(batch {position} of seed {config['data']['seed']}); nothing of it was kept. Lower "
                    f"optimizer.learning_rate or look at that batch; the last checkpoint is step {checkpoints.latest()}"
                )
            seconds = time.perf_counter() - began
            if step % c["log_every"] == 0 or step == c["steps"]:
                metrics_to.write(step, {**last, "learning_rate": float(program.schedule(step - 1))})
                tokens = int(np.prod(batch["tokens"].shape))
                timings_to.write(step, {"seconds": seconds, "tokens_per_second": tokens / seconds})
            if step % c["eval_every"] == 0 or step == c["steps"]:
                look(step)
            stopping = stop.asked() and step < c["steps"]  # asked once: what comes later is for the next step
            if step % c["save_every"] == 0 or step == c["steps"] or stopping:
                save(step)
            progress.update(bar, advance=1, loss=last["loss"], valid=facts.get("valid") or math.nan)
            if stopping:
                if writes:
                    logging.warning("stopped by a signal after step %d; run the same command to go on", step)
                break
    return {
        "trainable": trainable(run),
        "step": int(state.step),
        "loss": facts.get("loss"),  # saved with the last step: also of a run that was at its end already
        "valid": facts.get("valid"),
        "best": facts["best"],
        "adapter": str(workdir / "adapter"),
    }


def trainable(run: setup.Run) -> int:
    """How many numbers train."""
    return core_sites.count(run.method, run.base.params, run.base.sites)["trainable"]


def show(run: setup.Run, console: Console | None = None) -> None:
    """Print what trains: a line for each kind of leaf, and the sum; and what lies in few bits."""
    table = Table(title=f"{run.method.name} on {run.base.path.name}", title_justify="left")
    table.add_column("trainable leaf", overflow="fold")
    for column in ("leaves", "shape", "numbers"):
        table.add_column(column, justify="right")
    kinds: dict[str, list[Any]] = {}
    for path, leaf in tree.flatten(run.part.trainable).items():
        kind = "/".join("*" if p.isdigit() else p for p in path.split("/"))
        kinds.setdefault(kind, []).append(leaf)
    for kind, leaves in kinds.items():
        shape = "x".join(map(str, leaves[0].shape))
        table.add_row(kind, str(len(leaves)), shape, f"{tree.count(leaves):,}")
    n = core_sites.count(run.method, run.base.params, run.base.sites)
    share = 100 * n["trainable"] / n["total"]
    table.add_section()
    table.add_row("trainable", "", f"{share:.3f}% of {n['total']:,}", f"{n['trainable']:,}")
    console = console or Console(stderr=True, quiet=not processes.first())
    console.print(table)
    if any(map(tree.is_packed, tree.flatten(run.base.params).values())):
        console.print(quantization.report(tree.unpacked(run.base.params), run.base.params), soft_wrap=True)


def _not_base(run: setup.Run) -> dict[str, Any]:
    """Frozen leaves that are not the base's own, by path: saved with every checkpoint."""
    own = tree.flatten(run.base.params)
    return {p: x for p, x in tree.flatten(run.part.frozen).items() if p not in own}


def claimed(workdir: Path, config: Mapping[str, Any]) -> bool:
    """Does the folder hold a run of this config? Raises ValueError where it holds one of another."""
    file = workdir / "config.json"
    if not file.exists():
        return False
    mine, theirs = json.loads(json.dumps(config)), source.read_json(file)
    a, b = (tree.flatten({k: v if isinstance(v, dict) else {"": v} for k, v in x.items()}) for x in (mine, theirs))
    free = ("train/check_memory", "mesh/", "data/test")  # a run may go on on other devices; test is none of its own
    differ = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k) and not k.startswith(free))
    if differ:
        key = differ[0]
        raise ValueError(
            f"{workdir} holds a run of another config: {key.rstrip('/').replace('/', '.')} is {b.get(key)!r} "
            f"there and {a.get(key)!r} here ({len(differ)} differ); choose a new --workdir"
        )
    return True


def claim(workdir: Path, config: Mapping[str, Any]) -> None:
    """Write the config into the folder."""
    workdir.mkdir(parents=True, exist_ok=True)
    source.write_json(workdir / "config.json", config)


def _calibrated(base: setup.Base, config: Mapping[str, Any], batches: Any, file: Path) -> tuple[dict[str, Any], Any]:
    """config.method with the ranks that a look at the data gave, and what it found; kept, so that a run that goes on
    has the same.
    """
    if file.exists():
        return source.read_json(file), None
    found = setup.calibrate(base, config, batches)
    if found is None:
        return config["method"], None
    settings = found.settings(setup.make_method(base, config["method"]), adjust=config["calibration"]["adjust"])
    return {"name": config["method"]["name"], **settings}, found


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  valid {task.fields[valid]:.4f}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not processes.first(),
    )


class Stop:
    """SIGTERM asks, in whichever process; the loop saves after the step it is in, everywhere the same."""

    def __init__(self) -> None:
        self._asked = False

    def asked(self) -> bool:
        return processes.anyone(self._asked)

    def __enter__(self) -> Stop:
        try:
            self._old = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:  # not the main thread
            self._old = None
        return self

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def __exit__(self, *_: Any) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)
