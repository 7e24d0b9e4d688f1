"""What a program costs: operations of a traced one; bytes of memory and of messages of a compiled one.

`Compiled.cost_analysis()` counts the body of a loop once, and there is none for GPUs that are not here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex
from jax.interpreters import partial_eval


def flops(traced: Any) -> int:
    """Multiplications and additions of all products of a traced function (`jax.jit(f).trace(...)`), over all devices.

    Loop bodies count as often as they run, of branches the dearest, a kernel by its CostEstimate; one without
    (Splash) by its body at every step of its grid, those over blocks that no query sees among them. What no result
    needs is left out first, as a compiler does. Elementwise work is not counted.
    """
    jaxpr = traced.jaxpr.jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return _flops(used)


def _flops(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name, p = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = p["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
            features = kernel[p["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(out) * math.prod(kernel) // features
        elif name == "pallas_call":
            estimate = p.get("cost_estimate")
            steps = math.prod(n for n in p["grid_mapping"].grid if isinstance(n, int))
            total += steps * _flops(p["jaxpr"]) if estimate is None else estimate.flops
        elif name == "scan":
            total += p["length"] * _flops(p["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(_flops(branch.jaxpr) for branch in p["branches"])
        elif name == "shard_map":
            parts = math.prod(p["mesh"].shape[a] for a in p["newly_manual_axes"])
            total += parts * _flops(getattr(p["jaxpr"], "jaxpr", p["jaxpr"]))
        else:  # calls; of a `while`, whose turns nobody knows, one turn
            total += sum(_flops(getattr(j, "jaxpr", j)) for value in p.values() for j in _jaxprs(value))
    return total


def _jaxprs(value: Any) -> Iterator[Any]:
    if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for v in value:
            yield from _jaxprs(v)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of one device.

    memory:   that its main memory reads and writes.
    messages: {kind of collective: bytes that reach it from others}.
    """

    memory: int
    messages: dict[str, int]


def traffic(compiled: jax.stages.Compiled, *, kinds: Sequence[str] = (), across: int | None = None) -> Traffic:
    """What a compiled program moves, from its text: loop bodies as often as they run, of branches the dearest.

    An instruction reads its operands and writes its results; one that is fused takes and gives slices of its operands
    where it uses no more. Memory besides the main one (VMEM, the host's) does not count.

    Args:
      kinds: of numbers, as HLO calls them, such as "u8" for packed codes; others do not count. By default all do.
      across: devices of one host; only messages between several hosts count then.
    """
    program = _parse(compiled.as_text(), frozenset(kinds), across)
    memory, messages = program.cost(program.entry)
    return Traffic(int(memory), {k: int(v) for k, v in sorted(messages.items())})


# --- the text of a compiled program -------------------------------------------------------------------------

BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "s2": 2, "u2": 2}
FREE = set(
    "bitcast tuple get-tuple-element parameter constant after-all while conditional call iota partition-id replica-id "
    "opt-barrier add-dependency".split()
)
MOVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)


@dataclasses.dataclass
class _Op:
    name: str
    kind: str
    shape: str
    operands: list[str]
    rest: str  # what stands behind the operands
    root: bool

    @property
    def called(self) -> list[str]:
        return [n.strip().lstrip("%") for one, many in CALLED.findall(self.rest) for n in (one or many).split(",")]


@dataclasses.dataclass
class _Program:
    entry: str
    bodies: dict[str, dict[str, _Op]]
    kinds: frozenset[str]
    across: int | None = None

    def __post_init__(self):
        self._known: dict[str, tuple[float, Counter]] = {}

    def cost(self, name: str) -> tuple[float, Counter]:
        """(bytes of memory, bytes of messages by kind) of one run of a computation."""
        if name in self._known:
            return self._known[name]
        body, memory, messages = self.bodies[name], 0.0, Counter()
        channels: dict[str, tuple[str, float]] = {}  # a message that several instructions wait for is one
        for op in body.values():
            if op.kind == "while":
                turns, (own, sent) = self.turns(op), self.cost(op.called[-1])
                memory += turns * own
                messages.update({k: turns * v for k, v in sent.items()})
            elif op.kind == "conditional":
                own, sent = max((self.cost(b) for b in op.called), key=lambda c: (c[0], sum(c[1].values())))
                memory += own
                messages.update(sent)
            elif op.kind == "call":
                own, sent = self.cost(op.called[0])
                memory += own
                messages.update(sent)
            else:
                memory += self.moved(op, body)
                for kind, channel, size in self.sent(op, body):
                    channels[channel] = (kind, max(size, channels.get(channel, ("", 0.0))[1]))
        for kind, size in channels.values():
            messages[kind] += size
        self._known[name] = memory, messages
        return memory, messages

    def turns(self, op: _Op) -> int:
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', op.rest):
            return int(found[1])
        condition = self.bodies[re.search(r"condition=%?([\w.\-]+)", op.rest)[1]]
        for test in condition.values():
            if test.kind == "compare" and "direction=LT" in test.rest:
                for operand in test.operands:
                    if operand in condition and condition[operand].kind == "constant":
                        return int(condition[operand].operands[0])
        return 1  # who knows

    def sent(self, op: _Op, body: dict[str, _Op]) -> Iterator[tuple[str, str, float]]:
        """(kind, channel, bytes that reach one device) of the messages in an instruction or what is fused into it."""
        kind = op.kind.removesuffix("-start")
        if kind in MOVES:
            groups = _groups(op.rest)
            if self.across and groups is not None and (groups // self.across == groups[:, :1] // self.across).all():
                return
            given = sum(self.size(body[o].shape, everywhere=True) for o in op.operands if o in body)
            got = self.size(op.shape, everywhere=True)
            if op.kind.endswith("-start"):  # its result names the operands too
                got = got - given if kind not in ("all-reduce",) else given
            n = 2 if groups is None else groups.shape[1]
            size = {
                "all-gather": got - given,
                "reduce-scatter": given - got,
                "all-reduce": 2 * given * (n - 1) / n,
                "all-to-all": given * (n - 1) / n,
            }.get(kind, given)
            channel = re.search(r"channel_id=(\d+)", op.rest)
            yield kind, channel[1] if channel else op.name, max(0, size)
        elif op.kind in ("fusion", "async-start"):
            for inner in op.called:
                for each in self.bodies[inner].values():
                    yield from self.sent(each, self.bodies[inner])

    def moved(self, op: _Op, body: dict[str, _Op]) -> float:
        """Bytes of main memory that an instruction reads and writes."""
        if op.kind in FREE or op.kind.endswith("-done"):
            return 0
        shapes = [body[o].shape for o in op.operands if o in body]
        if op.kind == "dynamic-slice" or op.kind == "gather":
            return 2 * self.size(op.shape)
        if op.kind == "dynamic-update-slice":
            return 2 * self.size(shapes[1])
        if op.kind in ("copy-start", "slice-start"):
            first = ARRAY.search(op.shape)
            return self.size(first[0] if first else "") + (
                sum(map(self.size, shapes)) if op.kind == "copy-start" else 0
            )
        if op.kind == "fusion":
            return self.fused(op, shapes)
        return self.size(op.shape) + sum(map(self.size, shapes))

    def fused(self, op: _Op, shapes: list[str]) -> float:
        inner = self.bodies[op.called[0]]
        users: dict[str, list[_Op]] = {}
        for each in inner.values():
            for operand in each.operands:
                users.setdefault(operand, []).append(each)

        def read(name: str, whole: float) -> float:
            total = 0.0
            for user in users.get(name, ()):
                if user.kind == "bitcast":
                    total += read(user.name, whole)
                elif user.kind in ("dynamic-slice", "slice", "gather"):
                    total += self.size(user.shape, everywhere=True)
                elif user.kind == "dynamic-update-slice" and user.operands[0] == name:
                    continue  # in place
                elif user.kind not in ("tuple", "get-tuple-element"):
                    return whole
            return min(total, whole)

        def written(name: str, whole: float) -> float:
            at = inner.get(name)
            if at is None:
                return whole
            if at.kind == "bitcast":
                return written(at.operands[0], whole)
            if at.kind == "dynamic-update-slice" and at.operands[1] in inner:
                return min(whole, self.size(inner[at.operands[1]].shape, everywhere=True))
            return whole

        total = 0.0
        for each in inner.values():
            if each.kind == "parameter" and (number := int(each.operands[0])) < len(shapes):
                total += read(each.name, self.size(shapes[number]))
        root = next(each for each in inner.values() if each.root)
        if root.kind == "tuple":
            parts = [m[0] for m in ARRAY.finditer(op.shape)]
            return total + sum(written(o, self.size(s)) for o, s in zip(root.operands, parts, strict=False))
        return total + written(root.name, self.size(op.shape))

    def size(self, shape: str, everywhere: bool = False) -> float:
        """Bytes of the arrays of a shape that count; of those in main memory unless `everywhere`."""
        total = 0.0
        for kind, sizes, layout in ARRAY.findall(shape):
            if (self.kinds and kind not in self.kinds) or (not everywhere and re.search(r"S\([1-9]", layout)):
                continue
            bits = BITS.get(kind)
            if bits is None:
                digits = re.search(r"\d+", kind)
                bits = int(digits[0]) if digits else 8
                bits = 8 if kind.startswith("f8") else bits
            total += bits / 8 * math.prod(int(n) for n in sizes.split(",") if n)
        return total


def _parse(text: str, kinds: frozenset[str] = frozenset(), across: int | None = None) -> _Program:
    bodies: dict[str, dict[str, _Op]] = {}
    entry, body = "", {}
    for line in text.splitlines():
        if line and not line[0].isspace():
            if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                body = bodies.setdefault(found[2], {})
                entry = found[2] if found[1] else entry
            continue
        found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
        if not found:
            continue
        shape, rest = _head(line[found.end() :])
        kind, _, rest = rest.lstrip().partition("(")
        inside, rest = _until_closed(rest)
        operands = re.findall(r"%([\w.\-]+)", inside) or [w.strip() for w in inside.split(",") if w.strip()]
        body[found[2]] = _Op(found[2], kind, shape, operands, rest, bool(found[1]))
    return _Program(entry, bodies, kinds, across)


def _head(text: str) -> tuple[str, str]:
    """(the shape, what follows)"""
    if text.startswith("("):
        inside, rest = _until_closed(text[1:])
        return inside, rest
    shape, _, rest = text.partition(" ")
    return shape, rest


def _until_closed(text: str) -> tuple[str, str]:
    depth = 1
    for at in re.finditer(r"[()]", text):
        depth += 1 if at[0] == "(" else -1
        if not depth:
            return text[: at.start()], text[at.end() :]
    return text, ""


def _groups(rest: str) -> np.ndarray | None:
    """[groups, devices of one]: who sends whom a message, by places in the mesh; None where the text does not say."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+?)(?:, |$)", rest):
        return _ids(found[3]).reshape(int(found[1]), int(found[2]))
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", rest):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", found[1])])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))?\s*\{([^}]*)\}", rest):
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        own, axes = re.findall(r"'(\w+)'", found[3]), list(sizes)
        ids = _ids(found[2]) if found[2] else np.arange(math.prod(sizes.values()))
        order = [axes.index(axis) for axis in (*(a for a in axes if a not in own), *own)]
        return ids.reshape(*sizes.values()).transpose(order).reshape(-1, math.prod(sizes[a] for a in own))
    return None


def _ids(text: str) -> np.ndarray:
    """The numbers of "[2,4]T(1,0)": counted along these sizes, and their axes turned."""
    sizes, _, turned = text.partition("T")
    sizes = _numbers(sizes.strip("[]"))
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_numbers(turned.strip("()"))) if turned else ids


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
