"""What a fine-tuning method is: a record of functions that turn a parameter tree into two halves, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from peftax.core import tree


class Partition(NamedTuple):
    """Two disjoint trees; their union is what `apply` receives."""

    frozen: dict[str, Any]
    trainable: dict[str, Any]


@struct.dataclass
class Ctx:
    """What travels into every intercepted call.

    key:   for dropout; its absence means evaluation.
    chunk: int32 [], where a pass comes in several calls (the head's, chunk by chunk of the loss), which this is: each
           drops other numbers. What is dropped for all rows alike does not ask it.
    adapters: int [B], which adapter of a mixed batch each row takes, -1 for none; see peftax/mixed_batch.py.
    start: this call fills an empty cache with its rows' first tokens; what stands before them goes in now.
    front: how many virtual tokens stand before the first real one in this call; methods set it.
    tasks: int32 [B] (or [1], of all), each row's task, for methods that serve several; None: the method's own.
    """

    key: jax.Array | None = None
    chunk: jax.Array | None = None
    tasks: jax.Array | None = None
    adapters: jax.Array | None = None
    start: bool = struct.field(pytree_node=False, default=False)
    front: int = struct.field(pytree_node=False, default=0)

    def drop(self, x: jax.Array, rate: float) -> jax.Array:
        """x with a share `rate` of its numbers zeroed and the rest scaled up; x itself in evaluation."""
        if self.key is None or rate == 0.0:
            return x
        key = self.key if self.chunk is None else jax.random.fold_in(self.key, self.chunk)
        keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
        return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))

    def drop_outputs(self, y: jax.Array, rate: float, whole: float, *, even: bool = True) -> jax.Array:
        """A site's update y [..., out] without a share `rate` of its outputs, the same for all rows; y in evaluation.

        whole: the probability that nothing of it stays.
        even: the outputs that stay make up for the others.
        """
        if self.key is None or rate == whole == 0.0:
            return y
        keep = jax.random.bernoulli(self.key, 1.0 - rate, y.shape[-1:]).astype(jnp.float32)
        keep = keep / jnp.maximum(keep.mean(), 1 / keep.size) if even else keep
        keep = keep * jax.random.bernoulli(jax.random.fold_in(self.key, 1), 1.0 - whole)
        return y * keep.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


@struct.dataclass
class Kernel:
    """A site's kernel as its method sees it: w [in, out] (or its shape), bias [out] or None."""

    w: Any
    b: Any = None
    kind: str = struct.field(pytree_node=False, default="linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A transform of a parameter tree. Built by `lift.per_kernel`, `lift.per_block`, `lift.select` and `chain`.

    init:   (key, params, sites) -> Partition.  Works on shapes too, under `jax.eval_shape`.
    call:   what `inject` does at a place that holds the method's leaves; None when nothing is intercepted.
              on a kernel: (its leaves, x, Kernel, ctx, where) -> y
              on a block:  (its leaves, run, args, ctx, where) -> what run(*args) returns, changed
    on:     "kernel" or "block".
    adapter: the name under which its leaves lie; others of the same method may stand beside them and do nothing.
    share:  where several parts meet at one kernel, what they change of y is added up, each times its share; None:
            they may not meet.
    fold:   (params, sites) -> params without theta; None for what is no change of weights.
    move:   (params with theta, sites) -> params whose base stands where theta began; None when the base stays.
    begin:  (partition, prefill, sites) -> the partition with trainable leaves that start from what the untouched model
            computes: prefill(ids) -> keys, values [L, K, S, H]; None where init says it all.
    around: (run, args, kwargs, ctx) -> what run(args, kwargs, ctx) returns, changed: a whole forward pass.
    front:  virtual tokens that it puts before the first, which a cache has to hold.
    tied:   leaves at a table act at a head tied to it too, and a fold leaves the two tied.
    penalty: (params, sites) -> scalar that training adds to the mean loss.
    chosen: (Hugging Face name of a leaf of the base, sites) -> does it train as it is?
    wrap:   (optimizer, steps of the run, sites) -> an optimizer that sees raw gradients and the whole trainable tree.
    pads:   zeros behind a leaf's rank change nothing and stay zeros in training, so that runs of other ranks may share
            a program.
    parts:  the methods that a chain holds; itself otherwise.
    """

    name: str
    init: Callable[..., Partition]
    fold: Callable[..., dict[str, Any]] | None
    call: Callable[..., Any] | None = None
    on: str = "kernel"
    adapter: str = "default"
    share: float | None = None
    move: Callable[..., dict[str, Any]] | None = None
    begin: Callable[..., Partition] | None = None
    around: Callable[..., Any] | None = None
    front: int = 0
    tied: bool = False
    axes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    penalty: Callable[..., jax.Array] | None = None
    wrap: Callable[..., Any] | None = None
    settings: Callable[[str, str], dict[str, Any] | None] | None = None
    chosen: Callable[[str, Any], bool] | None = None
    needs: str = "product"
    pads: bool = False
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parts: tuple[Method, ...] = ()


def chain(*methods: Method, name: str | None = None, config: Mapping[str, Any] | None = None) -> Method:
    """Several methods as one, applied left to right. Two that train one leaf raise at init."""

    def init(key, params, sites) -> Partition:
        frozen, trainable, wholes = dict(params), {}, []
        for i, method in enumerate(methods):
            of_method = jax.random.fold_in(key, i) if i else key
            for j, part in enumerate(parts(method)):
                own = jax.random.fold_in(of_method, j) if j else of_method
                if part.call is None:  # what trains of the base is chosen when all others have seen it
                    wholes.append((part, own))
                    continue
                frozen, more = part.init(own, frozen, sites)
                trainable = tree.merge(trainable, more)
        base, holder = tree.flatten(params).keys(), {}
        for part, own in wholes:
            bare = tree.split(frozen, lambda path: path in base)[1]
            for path, leaf in tree.flatten(part.init(own, bare, sites).trainable).items():
                if path in holder:
                    raise ValueError(
                        f"chain: {holder[path][0]} and {part.name} both train {path!r}; one must leave it out"
                    )
                holder[path] = part.name, leaf
        _check_starts(methods, holder, sites)
        whole = tree.unflatten({path: leaf for path, (_, leaf) in holder.items()})
        return Partition(tree.split(frozen, lambda path: path in holder)[0], tree.merge(trainable, whole))

    def fold(params, sites):
        for method in methods:
            assert method.fold is not None
            params = method.fold(params, sites)
        return params

    def move(params, sites):
        for method in methods:
            params = method.move(params, sites) if method.move else params
        return params

    def begin(part, prefill, sites):
        for method in methods:
            part = method.begin(part, prefill, sites) if method.begin else part
        return part

    def penalty(params, sites):
        return sum((m.penalty(params, sites) for m in methods if m.penalty), start=jnp.float32(0))

    def wrap(optimizer, steps, sites):
        for method in methods:
            optimizer = method.wrap(optimizer, steps, sites) if method.wrap else optimizer
        return optimizer

    def chosen(name: str, sites) -> bool:
        return any(m.chosen(name, sites) for m in methods if m.chosen)

    return Method(
        name=name or "+".join(m.name for m in methods),
        init=init,
        fold=None if any(m.fold is None for m in methods) else fold,
        move=move if any(m.move for m in methods) else None,
        begin=begin if any(m.begin for m in methods) else None,
        front=sum(m.front for m in methods),
        penalty=penalty if any(m.penalty for m in methods) else None,
        wrap=wrap if any(m.wrap for m in methods) else None,
        chosen=chosen if any(m.chosen for m in methods) else None,
        parts=tuple(p for m in methods for p in (m.parts or (m,))),
        pads=all(m.pads for m in methods),
        needs=max((m.needs for m in methods), key=("product", "norms", "dense").index, default="product"),
        config=config or (dict(methods[0].config) if len(methods) == 1 else {m.name: dict(m.config) for m in methods}),
    )


def _check_starts(methods: Sequence[Method], holder: Mapping[str, Any], sites) -> None:
    """Raise where a kernel trains whole of which a part keeps what it was at the start."""
    for part in (p for m in methods for p in parts(m) if p.call and (p.move or p.needs == "norms")):
        for site in (s for s in sites.values() if s.kind in ("linear", "conv") and s.kernel in holder):
            assert part.settings is not None  # a method with leaves at sites has targets
            if any(part.settings(n, site.kind) is not None for n in site.names):
                raise ValueError(
                    f"chain: {part.name} stands on {site.kernel!r} as it was at its start, and "
                    f"{holder[site.kernel][0]} trains it; one must leave it out"
                )


def parts(method: Method) -> tuple[Method, ...]:
    return method.parts or (method,)


def check_tasks(method: Method, tasks: Sequence[int]) -> None:
    """Raise where one of these is no task of the method: inside a program it would only make NaN."""
    known = max((m.config.get("tasks", 0) for m in parts(method)), default=0)
    if not known:
        raise ValueError(f"{method.name}: has no tasks; leave out the task {tasks[0]}")
    for task in tasks:
        if not 0 <= task < known:
            raise ValueError(f"{method.name}: task {task} is none of 0 to {known - 1}")
