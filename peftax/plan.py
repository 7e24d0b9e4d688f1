"""Does a run fit a machine that is not here, and what does it cost?

The run's own programs are compiled for the machine: memory is the compiler's figure ("compiled"). Operations are
counted from the traced programs, bytes moved from the compiled ones ("counted"); times are what these need at the
machine's peaks, or at a share of them ("estimated"). Nothing is run.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from peftax import machines, recipe
from peftax.core import sites as core_sites
from peftax.core import tree
from peftax.machines import cost
from peftax.machines.kinds import GIB
from peftax.train import memory, population, programs, setup
from peftax.weights import outlines

RESERVE = 3 * GIB // 2  # what libraries, the allocator's gaps and the runtime itself take
SHARES = (0.3, 0.4, 0.5)  # of a machine's peak that trainings reach
RUNNING = ("init", "step", "evaluate")  # what a run executes; a merge may happen elsewhere
NF4 = ("_proj/kernel$", {"fmt": "nf4", "group": 64, "double": True})
BITS = ((NF4,), (NF4, ("embed_tokens|lm_head", {"fmt": "int8"})))  # what a search may try


@dataclasses.dataclass(frozen=True)
class Program:
    """One program on one device.

    bytes:    that must fit: the compiler's, and what else lies there meanwhile.
    parts:    the compiler's figures, see machines.memory.
    flops:    of all devices together.
    traffic:  bytes between memory and cores.
    packed:   of these, bytes of packed codes.
    messages: {kind of collective: bytes that reach the device}.
    bounds:   {what: seconds that it needs at its peak}: compute, memory, interconnect.
    compiled: seconds that the compiler took.
    """

    name: str
    bytes: int
    parts: dict[str, int]
    flops: int
    traffic: int
    packed: int
    messages: dict[str, int]
    bounds: dict[str, float]
    compiled: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found.

    kinds:   {kind: bytes of one device during a step}; activations and temporaries share what the compiler says by
      the estimate that `peftax inspect` prints.
    members: runs that train in one program.
    tokens:  of a step, over all devices and members.
    epoch:   of the dataset, where its tokens were given: {share of peak: {"hours", "device_hours", "cost"}}.
    """

    model: str
    method: str
    machine: str
    devices: int
    mesh: dict[str, int]
    trainable: int
    total: int
    programs: dict[str, Program]
    kinds: dict[str, int]
    peak: int
    available: int
    fits: bool
    tokens: int
    members: int = 1
    epoch: dict[str, dict[str, float]] | None = None

    @property
    def seconds(self) -> float:
        """Of a step at the machine's peaks: the slowest of its bounds; 0 where the machine's peaks are unknown."""
        return max(self.programs["step"].bounds.values(), default=0.0)


def plan(
    config: Mapping[str, Any],
    machine: machines.Machine,
    *,
    only: Sequence[str] = (),
    members: int = 1,
    tokens: int | None = None,
    price: float | None = None,
) -> Plan:
    """Compile a config's programs for a machine and add up what they need.

    Args:
      only: names of programs; by default all that the config has.
      members: that train in one step, as `peftax sweep` lets them.
      tokens: of a dataset, padding counted, for the time of one epoch.
      price: of one device and hour.

    Raises ValueError where a compiler is missing, and says what to install.
    """
    if tokens is not None and only and "step" not in only:
        raise ValueError(f"programs {', '.join(only)}: the time of {tokens:,} tokens wants step among them")
    if members < 1:
        raise ValueError(f"members {members}: want 1, or how many runs of a sweep train in one program")
    run = sketch(config, machine)
    made = programs.training(run, config)
    every = programs.every(run, config, made, only)
    if members > 1 and "step" in every:
        every["step"] = population.program(run.base, [config] * members)
    beside = {  # the optimizer waits for the next step; a merge takes copies of one layer at a time
        "evaluate": members * machines.shard_bytes(made.state.opt_state),
        "merge": sum(machines.shard_bytes(programs.placed(x, run.base.places(x, run.method))) for x in run.part),
    }
    found = {name: _compiled(name, program, machine, beside.get(name, 0)) for name, program in every.items()}
    peak = max((found[name].bytes for name in found if name in RUNNING), default=0)
    n = core_sites.count(run.method, run.base.params, run.base.sites)
    c, data = config["train"], config["data"]
    per_step = members * c["batch_size"] * c["accumulate"] * (data["train_length"] or data["length"])
    done = Plan(
        model=config["model"]["path"],
        method=run.method.name,
        machine=machine.name,
        devices=machine.count,
        mesh=dict(run.base.mesh.shape),
        trainable=n["trainable"],
        total=n["total"],
        programs=found,
        kinds=_kinds(run, config, every["step"], found["step"].bytes, members) if "step" in found else {},
        peak=peak,
        available=machine.kind.memory,
        fits=peak + RESERVE <= machine.kind.memory,
        tokens=per_step,
        members=members,
    )
    if tokens is None or not done.seconds:
        return done
    return dataclasses.replace(done, epoch=epoch(done, machine, tokens, price))


def sketch(config: Mapping[str, Any], machine: machines.Machine) -> setup.Run:
    """The run in shapes, on devices that are not here. Weights that are here say in how few bits they lie."""
    where, model = setup.resolve(config["model"]["path"]), dict(config["model"])
    files = None
    if not outlines.holds_weights(where):
        files = outlines.outline(where)
        del model["revision"]
    base = setup.outline(**model, mesh=config["mesh"], files=files, devices=machine.devices())
    return setup.sketch(base, config["method"])


def epoch(done: Plan, machine: machines.Machine, tokens: int, price: float | None) -> dict[str, dict[str, float]]:
    """Hours for that many tokens at shares of the machine's peak arithmetic; and their cost."""
    work = done.programs["step"].flops * tokens / done.tokens
    out = {}
    for share in SHARES:
        hours = work / (machine.count * machine.kind.flops * share) / 3600
        out[f"{share:.0%}"] = {"hours": hours, "device_hours": hours * machine.count}
        if price is not None:
            out[f"{share:.0%}"]["cost"] = hours * machine.count * price
    return out


def _compiled(name: str, program: programs.Program, machine: machines.Machine, beside: int) -> Program:
    """`beside`: bytes that lie there meanwhile."""
    traced = program.run.trace(*program.args)
    operations = cost.flops(traced)
    began = time.perf_counter()
    compiled = machines.compile(program.run, *program.args, traced=traced)
    seconds = time.perf_counter() - began
    parts, moved = machines.memory(compiled), cost.traffic(compiled)
    kind, bounds = machine.kind, {}
    sent, far = sum(moved.messages.values()), 0
    if machine.hosts > 1 and kind.platform != "tpu":  # a TPU's links reach all of its slice
        far = sum(cost.traffic(compiled, across=kind.per_host).messages.values())
    if kind.flops:
        bounds = {
            "compute": operations / machine.count / kind.flops,
            "memory": moved.memory / kind.bandwidth,
            "interconnect": (sent - far) / kind.link + (far / kind.network if far else 0.0),
        }
    return Program(
        name=name,
        bytes=parts["bytes"] + beside,
        parts=parts,
        flops=operations,
        traffic=moved.memory,
        packed=cost.traffic(compiled, kinds=("u8",)).memory,
        messages=moved.messages,
        bounds=bounds,
        compiled=seconds,
    )


def _kinds(
    run: setup.Run, config: Mapping[str, Any], step: programs.Program, bytes_: int, members: int
) -> dict[str, int]:
    """Bytes by kind: what lies there as it lies, the rest of the compiler's figure by the estimate's shares."""
    own, frozen = tree.flatten(run.base.params), tree.flatten(step.frozen)
    base = machines.shard_bytes([x for path, x in frozen.items() if path in own])
    adapters = machines.shard_bytes([x for path, x in frozen.items() if path not in own] + [step.state.trainable])
    optimizer = machines.shard_bytes(step.state.opt_state)
    rest = max(0, bytes_ - base - adapters - optimizer)
    kept = min(rest, members * memory.estimate(run, config).activations)
    return {
        "base": base,
        "adapters": adapters,
        "optimizer": optimizer,
        "activations": kept,
        "temporaries": rest - kept,
    }


# --- search ---------------------------------------------------------------------------------------


def search(
    config: Mapping[str, Any],
    machine: machines.Machine,
    *,
    most: int = 6,
    batches: Sequence[int] = (1, 2, 4, 8, 16),
    remats: Sequence[str] = ("dots", "full", "offload"),
    quantized: Sequence[Any] = (),
) -> list[tuple[dict[str, Any], Plan]]:
    """Configs of this one that fit, the quickest by their bounds first: meshes, rows a device, remat, quantization.

    An estimate without a compiler leaves out what cannot fit; of the rest the `most` with the most rows a device are
    compiled, the others are not looked at. Of as many rows those that make less again come first, then those whose bits
    are named first.

    Args:
      remats: the least of making again first.
      quantized: values of config.model.quantize to try beside the config's own.

    Raises ValueError, the first that was met, where none of them can be made.
    """
    tried, too_large, refused, own = [], 0, [], config["model"]["quantize"]
    bits = [own, *(rules for rules in quantized if rules != own)]
    groups = machine.count // config["mesh"]["sequence"]  # of devices that share the tokens of their rows
    for mesh, rows, remat, rules in itertools.product(meshes(groups), batches, remats, bits):
        changed = {
            **config,
            "mesh": {**config["mesh"], **mesh},
            "model": {**config["model"], "remat": remat, "quantize": rules},
            "train": {**config["train"], "batch_size": rows * groups // mesh["tensor"]},
        }
        try:
            need = memory.estimate(sketch(changed, machine), changed)
        except ValueError as error:  # a mesh or a batch that this model does not divide, or what no mesh mends
            refused.append(error)
            continue
        if need.total + RESERVE <= 1.2 * machine.kind.memory:  # an estimate errs
            tried.append((changed, need))
        else:
            too_large += 1

    if refused and not tried and not too_large:
        raise refused[0]

    def order(candidate):
        changed, need = candidate
        model, rows = changed["model"], changed["train"]["batch_size"]
        return -rows, remats.index(model["remat"]), bits.index(model["quantize"]), need.total

    tried.sort(key=order)
    found = [(changed, plan(changed, machine, only=("step",))) for changed, _ in tried[:most]]
    fitting = [(changed, done) for changed, done in found if done.fits]
    return sorted(fitting, key=lambda f: f[1].seconds / f[1].tokens)


def meshes(devices: int) -> list[dict[str, int]]:
    """Ways to share a base: all over fsdp, or over tensor as far as one host's links reach."""
    widths = [2**i for i in range(4) if devices % 2**i == 0]
    return [{"data": 1, "fsdp": devices // t, "tensor": t} for t in widths]


# --- to be read -----------------------------------------------------------------------------------


def show(done: Plan, console: Console) -> None:
    """Tables of memory, of costs, of times."""
    mesh = ", ".join(f"{axis} {n}" for axis, n in done.mesh.items() if n > 1) or "one device"
    console.print(
        f"{done.model}, {done.method}: {done.trainable:,} of {done.total:,} train; {done.machine} ({mesh}); "
        f"{done.tokens:,} tokens a step" + (f" of {done.members} members" if done.members > 1 else "")
    )
    table = Table(title="bytes on one device", title_justify="left")
    table.add_column("during a step")
    table.add_column("", justify="right")
    for kind, n in done.kinds.items():
        table.add_row(kind, memory.size(n))
    table.add_section()
    for p in done.programs.values():
        note = "" if p.name in RUNNING else " (of one layer at a time)"
        table.add_row(f"{p.name}{note}, compiled", memory.size(p.bytes))
    table.add_section()
    table.add_row("the run's peak", memory.size(done.peak))
    table.add_row("and a reserve of", memory.size(RESERVE))
    table.add_row("there are", memory.size(done.available))
    console.print(table)
    console.print(
        "fits" if done.fits else f"does not fit: {memory.size(done.peak + RESERVE - done.available)} too much"
    )
    if "step" not in done.programs:
        return
    step = done.programs["step"]
    table = Table(title="one step (counted), and its time at the machine's peaks (estimated)", title_justify="left")
    for column in ("", "of", "seconds", "tokens/s"):
        table.add_column(column, justify="left" if column == "" else "right")
    moved = sum(step.messages.values())
    amounts = {
        "compute": f"{step.flops / 1e12:,.1f} TFLOP, all devices",
        "memory": f"{memory.size(step.traffic)} a device",
        "interconnect": f"{memory.size(moved)} a device",
    }
    for what, amount in amounts.items():
        seconds = step.bounds.get(what, 0.0)
        at_peak = (f"{seconds:.3f}", f"{done.tokens / seconds:,.0f}") if seconds else ("", "")
        table.add_row(what, amount, *at_peak)
    for kind, n in step.messages.items():
        table.add_row(f"  {kind}", memory.size(n), "", "", style="dim")
    console.print(table)
    if done.epoch:
        for share, found in done.epoch.items():
            price = f", {found['cost']:,.2f} at the price given" if "cost" in found else ""
            console.print(
                f"at {share} of peak: {found['hours']:.2f} h, {found['device_hours']:.2f} device-hours{price}"
            )


def differs(config: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """{"train.batch_size": 16, ...}: the keys in which a config is not the other."""
    mine, theirs = recipe.flat(config), recipe.flat(changed)
    return {key: value for key, value in theirs.items() if mine.get(key) != value}


def show_search(config: Mapping[str, Any], found: Sequence[tuple[dict[str, Any], Plan]], console: Console) -> None:
    """A line for each config that fits."""
    if not found:
        console.print("nothing that was compiled fits; a larger machine, fewer bits or a smaller length would")
        return
    table = Table(title="what fits, the quickest first", title_justify="left")
    for column in ("peak", "tokens/s at peak (estimated)", "bound by", "give"):
        table.add_column(column, justify="left" if column == "give" else "right")
    for changed, done in found:
        step = done.programs["step"]
        bound = max(step.bounds, key=step.bounds.__getitem__, default="")
        flags = " ".join(shlex.quote(f"--config.{key}={value}") for key, value in differs(config, changed).items())
        table.add_row(memory.size(done.peak), f"{done.tokens / done.seconds:,.0f}" if bound else "", bound, flags)
    console.print(table)


def to_json(done: Plan) -> dict[str, Any]:
    return {
        **dataclasses.asdict(done),
        "reserve": RESERVE,
        "seconds": done.seconds if done.programs.get("step") else None,
    }
