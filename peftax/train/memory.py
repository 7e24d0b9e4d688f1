"""What memory a training step needs, by kind: told from shapes, before weights are read and anything is compiled.

The gradient of the loss is traced, and what lives at its worst moment is added up. Against XLA on a CPU it errs by less
than 1.6 either way (tests/train/memory_test.py), but for unrolled layers with remat: there XLA keeps what it was told
to make again, and needs twice the estimate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from rich.console import Console
from rich.table import Table

from peftax.core import tree
from peftax.core.method import Ctx
from peftax.train import loss, optimizers, setup
from peftax.train.step import State

KINDS = {
    "base": "base",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer's state",
    "activations": "activations kept",
    "temporaries": "temporaries",
}


SHARED = ("cpu",)  # platforms whose devices have no memory but the host's


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on one device.

    base:        the frozen weights.
    adapters:    the method's leaves, frozen and trainable; of a method that trains the base, the trained weights.
    gradients:   of the trainable leaves; twice when parts are accumulated.
    optimizer:   its state.
    activations: what the forward pass keeps for the backward pass; not what waits in the host's memory (remat
                 "offload") where that is another.
    temporaries: what comes and goes besides, at the worst moment; one chunk of logits (`logits`) among it.
    """

    base: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int
    logits: int

    @property
    def total(self) -> int:
        return sum(getattr(self, kind) for kind in KINDS)

    def of(self, members: int, at_once: int) -> Need:
        """What members on one base need, of which so many compute at once; `self` is the largest member's."""
        once = {kind: at_once * getattr(self, kind) for kind in ("gradients", "activations", "temporaries", "logits")}
        return dataclasses.replace(self, adapters=members * self.adapters, optimizer=members * self.optimizer, **once)

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} {size(getattr(self, kind))}" for kind, name in KINDS.items())
        return f"{size(self.total)}: {kinds} (one chunk of logits {size(self.logits)})"


def estimate(run: setup.Run, config: Mapping[str, Any]) -> Need:
    """What a step of this config needs; `run` may be a sketch. One trace, nothing is compiled or computed."""
    c, data = config["train"], config["data"]
    optimizer, _ = optimizers.from_config(
        config["optimizer"], steps=c["steps"], method=run.method, sites=run.base.sites
    )
    rows, length = c["batch_size"], data["train_length"] or data["length"]
    shapes = tree.abstract({"frozen": run.part.frozen, "trainable": run.part.trainable})
    state = jax.eval_shape(lambda t: State.create(t, optimizer), shapes["trainable"])
    batch = {k: jax.ShapeDtypeStruct((rows, length), jnp.int32) for k in ("tokens", "targets", "positions")}
    batch["segment_ids"] = batch["tokens"]
    batch["weights"] = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    dropout = setup.drops(config["method"])

    def total(trainable, frozen, batch):
        ctx = Ctx(key=jax.random.key(0)) if dropout else None
        return loss.causal_lm(run.apply, tree.merge(frozen, trainable), batch, ctx, chunk=c["chunk"])

    traced = jax.make_jaxpr(jax.value_and_grad(total, has_aux=True))(shapes["trainable"], shapes["frozen"], batch)
    peak, kept = _walk(traced.jaxpr, until=traced.jaxpr.outvars[0])

    mesh = run.base.mesh
    if mesh.devices.flat[0].platform in SHARED:
        waiting = sum(_whole(v) for eqn in traced.jaxpr.eqns for v in eqn.outvars if _waits(v))
        peak, kept = peak + waiting, kept + waiting
    parts = mesh.size // mesh.shape["tensor"]  # of the batch; what tensor splits further is not counted on
    own = tree.flatten(run.base.params)
    frozen, trainable = (_on_one_device(run, half) for half in run.part)
    gradients = sum(trainable.values()) * (2 if c["accumulate"] > 1 else 1)
    moments = tree.nbytes(state.opt_state) * sum(trainable.values()) // max(1, tree.nbytes(shapes["trainable"]))
    temporaries = max(0, peak - kept - tree.nbytes(shapes["trainable"])) // parts
    if mesh.shape["fsdp"] * mesh.shape["sequence"] > 1:  # weights are gathered where they are used, a layer at a time
        temporaries += _largest_layer(run.base)
    return Need(
        base=sum(n for path, n in frozen.items() if path in own),
        adapters=sum(n for path, n in frozen.items() if path not in own) + sum(trainable.values()),
        gradients=gradients,
        optimizer=moments,
        activations=kept // parts,
        temporaries=temporaries,
        logits=rows * min(c["chunk"], length) * (len(run.base.labels) or run.base.config["vocab_size"]) * 4 // parts,
    )


def check(run: setup.Run, config: Mapping[str, Any], *, members: int = 1, at_once: Callable[[int], int] = int) -> Need:
    """The estimate. Raises MemoryError with bytes by kind and what to change where the devices have less.

    Args:
      members: of a population; `run` is the largest.
      at_once: of so many members, how many compute together; by default all.
    """
    one, there = estimate(run, config), free(run.base)
    need = one.of(members, at_once(members))
    if there is not None and need.total > there:
        fits = max((m for m in range(1, members) if one.of(m, at_once(m)).total <= there), default=0)
        fewer = [f"Give it members that are fewer: peftax sweep --together={fits}"] if fits else []
        raise MemoryError(
            f"a training step{f' of {members} members' if members > 1 else ''} needs an estimated {need}; "
            f"there are {size(there)}. {'; or '.join(fewer or changes(one, there, config))}; "
            "or config.train.check_memory=False, to start all the same"
        )
    return need


def changes(need: Need, there: int, config: Mapping[str, Any]) -> list[str]:
    """What to change so that a step needs less, for the kinds that weigh."""
    model, c, data = config["model"], config["train"], config["data"]
    length = data["train_length"] or data["length"]
    grows = need.activations + need.temporaries
    fixed = need.total - grows
    weighty = need.total / 8
    found = []
    if c["batch_size"] > 1 and grows > weighty:
        fits = max(1, min(c["batch_size"] - 1, int(c["batch_size"] * max(0, there - fixed) / grows)))
        less = f"config.train.batch_size={fits} instead of {c['batch_size']}"
        found.append(f"{less}, with more config.train.accumulate")
    if need.activations > weighty and model["remat"] not in ("full", "offload"):
        found.append("config.model.remat=full")
    if grows > weighty:
        found.append(f"config.data.train_length below {length}")
    if need.logits > weighty / 2 and c["chunk"] > 16:
        found.append(f"config.train.chunk={max(16, min(c['chunk'], length) // 4)}")
    if grows > weighty and model["dtype"] == "float32":
        found.append("config.model.dtype=bfloat16")
    if need.base > weighty and model["param_dtype"] == "float32":
        found.append("config.model.param_dtype=bfloat16")
    if need.adapters + need.gradients + need.optimizer > 2 * weighty:
        found.append("a config.method that trains less")
    found = found or ["a smaller base"]
    return [f"Give it {found[0]}", *found[1:]]


def free(base: setup.Base) -> int | None:
    """Bytes that a run may take on one device, those of `base` included; None where nobody says."""
    local = [d for d in base.mesh.devices.flat if d.process_index == jax.process_index()]
    if local[0].platform != "cpu":
        limits = [(d.memory_stats() or {}).get("bytes_limit") for d in local]
        return min((n for n in limits if n), default=None)
    there = available()
    if there is None:
        return None
    return (there + (0 if base.unread else tree.nbytes(base.params))) // len(local)


def available(proc: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of main memory that a process may still take: the machine's or its control group's, whichever is less."""
    found = []
    if proc.exists():
        lines = dict(line.split(":", 1) for line in proc.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        if (group / limit).exists() and (text := (group / limit).read_text().strip()).isdigit():
            stat = ((group / limit).parent / "memory.stat").read_text().split()
            stat = dict(zip(stat[::2], stat[1::2], strict=True))
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))  # given back when asked for
            found.append(max(0, int(text) - int((group / used).read_text()) + cached))
    return min(found, default=None)


def show(need: Need, there: int | None, console: Console) -> None:
    """A table of the kinds."""
    table = Table(title="a step's memory, estimated", title_justify="left")
    table.add_column("on one device")
    table.add_column("bytes", justify="right")
    for kind, name in KINDS.items():
        table.add_row(name, size(getattr(need, kind)))
        if kind == "temporaries":
            table.add_row("  of which one chunk of logits", size(need.logits))
    table.add_section()
    table.add_row("all", size(need.total))
    table.add_row("there are", "unknown" if there is None else size(there))
    console.print(table)


def size(n: float) -> str:
    """1536 -> "1.5 KiB"."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while n >= 1024 and len(units) > 1:
        n, units = n / 1024, units[1:]
    return f"{n:.0f} {units[0]}" if units[0] == "B" else f"{n:.1f} {units[0]}"


def _on_one_device(run: setup.Run, half: Mapping[str, Any]) -> dict[str, int]:
    """{path: bytes of a leaf's shard}."""
    places = tree.flatten(run.base.places(half, run.method))

    def share(x, place) -> int:
        return math.prod(place.shard_shape(tuple(x.shape))) * np.dtype(x.dtype).itemsize

    shares = {path: jax.tree.map(share, x, places[path]) for path, x in tree.flatten(half).items()}
    return {path: sum(jax.tree.leaves(of_arrays)) for path, of_arrays in shares.items()}


def _largest_layer(base: setup.Base) -> int:
    stacked = loose = 0
    for path, x in tree.flatten(base.params).items():
        above = [n for stack, n in base.sites.stacks.items() if path.startswith(stack + "/")]
        if above:
            stacked += tree.nbytes(x) // math.prod(above)
        else:
            loose = max(loose, tree.nbytes(x))
    return max(stacked, loose)


# --- how much a program holds at its worst moment -------------------------------------------------
# A compiler makes no buffer for an elementwise result that others of its kind consume at once. Without that a
# program seems to need twice what it does.

CHEAP = set(
    "add sub mul neg max min abs sign floor not and or xor eq ne lt le gt ge select_n convert_element_type "
    "broadcast_in_dim iota reshape squeeze expand_dims transpose stop_gradient square integer_pow div rsqrt sqrt "
    "is_finite clamp symbolic_zeros copy rev".split()
)
COSTLY = set("exp exp2 log log1p expm1 tanh logistic sin cos pow erf erf_inv".split())  # never made twice
SAME = set("reshape squeeze expand_dims stop_gradient sharding_constraint".split())  # the same bytes
REDUCE = set("reduce_sum reduce_max reduce_min argmax reduce_and reduce_or".split())
INLINE = set("jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call custom_vjp_call".split())


@dataclasses.dataclass
class _Op:
    name: str
    inputs: list[Any]
    outputs: list[Any]
    inside: list[Any]  # jaxprs
    slices: int  # bytes of what one turn of a scan reads of its stacked inputs


def _walk(jaxpr: Any, until: Any = None) -> tuple[int, int]:
    """(bytes beyond the inputs at the worst moment, bytes held once the variable `until` is there)."""
    names: dict[Any, Any] = {}
    ops = _flat(jaxpr, names)
    given = {*jaxpr.invars, *jaxpr.constvars}
    out = {names.get(v, v) for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    readers: dict[Any, list[int]] = {}
    for i, op in enumerate(ops):
        for v in op.inputs:
            readers.setdefault(v, []).append(i)
    last = {v: at[-1] for v, at in readers.items()} | dict.fromkeys(out, len(ops))
    fused = set()
    for op in reversed(ops):
        users = [i for v in op.outputs for i in readers.get(v, ())]
        cheap = op.name in CHEAP or (op.name in COSTLY and len(users) == 1)
        cheap = cheap and all(ops[i].name in CHEAP | COSTLY | REDUCE for i in users)
        if (cheap or op.name in SAME) and not out & set(op.outputs):
            fused.update(op.outputs)
            for v in op.inputs:  # they are read where the result is
                last[v] = max(last[v], *(last.get(o, 0) for o in op.outputs))
    sizes = {v: 0 if v in given or v in fused else _bytes(v) for op in ops for v in (*op.inputs, *op.outputs)}
    born = {v: i for i, op in enumerate(ops) for v in op.outputs}
    ends: dict[int, list[Any]] = {}
    for v in born:
        ends.setdefault(last.get(v, born[v]), []).append(v)
    held = worst = 0
    for i, op in enumerate(ops):
        held += sum(sizes[v] for v in op.outputs)
        inner = max((_walk(j)[0] for j in op.inside), default=0)
        worst = max(worst, held + inner + op.slices)
        held -= sum(sizes[v] for v in ends.get(i, ()))
    now = born.get(names.get(until, until), len(ops))
    kept = sum(sizes[v] for v, at in born.items() if at <= now < last.get(v, at) and v not in out)
    return worst, kept


def _flat(jaxpr: Any, names: dict[Any, Any]) -> list[_Op]:
    """The operations in order, with plain calls written out; `names` maps a call's variables to the caller's."""
    ops: list[_Op] = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inside = [getattr(j, "jaxpr", j) for p in eqn.params.values() for j in _jaxprs(p)]
        inputs = [names.get(v, v) for v in eqn.invars if not isinstance(v, jex.Literal)]
        if name in INLINE and len(inside) >= 1 and len(inside[0].invars) == len(eqn.invars):
            body = inside[0]
            call = dict(names)
            for theirs, mine in zip(body.invars, eqn.invars, strict=True):
                if not isinstance(mine, jex.Literal):
                    call[theirs] = names.get(mine, mine)
            fresh: dict[Any, Any] = {}
            for op in _flat(body, call):  # the same body may be called twice: its variables are new each time
                for v in op.outputs:
                    fresh[v] = _Fresh(_bytes(v))
                op.inputs = [fresh.get(v, v) for v in op.inputs]
                op.outputs = [fresh[v] for v in op.outputs]
                ops.append(op)
            for theirs, mine in zip(body.outvars, eqn.outvars, strict=True):
                if not isinstance(theirs, jex.Literal):
                    there = call.get(theirs, theirs)
                    names[mine] = fresh.get(there, there)
            continue
        slices = 0
        if name == "scan":
            skip = eqn.params["num_consts"] + eqn.params["num_carry"]
            slices = sum(_bytes(v) for v in inside[0].invars[skip:])
        ops.append(_Op(name, inputs, list(eqn.outvars), inside, slices))
    return ops


class _Fresh:
    """A variable of a call that was written out."""

    def __init__(self, bytes: int):
        self.bytes = bytes


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [j for v in value for j in _jaxprs(v)]
    return []


def _bytes(v: Any) -> int:
    if isinstance(v, _Fresh):
        return v.bytes
    return 0 if _waits(v) else _whole(v)


def _waits(v: Any) -> bool:
    """In the host's memory?"""
    return getattr(v.aval, "memory_space", None) == jax.memory.Space.Host


def _whole(v: Any) -> int:
    shape, dtype = getattr(v.aval, "shape", ()), getattr(v.aval, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 0)
