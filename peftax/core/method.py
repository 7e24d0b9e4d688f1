"""What a fine-tuning method is: a record of functions that turn a parameter tree into two halves, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import struct

from peftax.core import tree


class Partition(NamedTuple):
    """Two disjoint trees; their union is what `apply` receives."""

    frozen: dict[str, Any]
    trainable: dict[str, Any]


@struct.dataclass
class Ctx:
    """What travels into every intercepted call; the absence of a key means evaluation."""

    key: jax.Array | None = None


@struct.dataclass
class Kernel:
    """A site's kernel as its method sees it: w [in, out] (or its shape), bias [out] or None."""

    w: Any
    b: Any = None
    kind: str = struct.field(pytree_node=False, default="linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A transform of a parameter tree. Built by `sites.per_kernel`, `sites.select` and `chain`.

    init:  (key, params, sites) -> Partition.  Works on shapes too, under `jax.eval_shape`.
    call:  (theta of one adapter, x, Kernel, ctx, where) -> y, or None when nothing is intercepted.
    fold:  (params, sites) -> params without theta.
    parts: the methods that a chain holds; itself otherwise.
    """

    name: str
    init: Callable[..., Partition]
    fold: Callable[..., dict[str, Any]]
    call: Callable[..., jax.Array] | None = None
    axes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    settings: Callable[[str, str], dict[str, Any] | None] | None = None
    chosen: Callable[[str], bool] | None = None
    needs: str = "product"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parts: tuple[Method, ...] = ()


def chain(*methods: Method, name: str | None = None, config: Mapping[str, Any] | None = None) -> Method:
    """Several methods as one, applied left to right. Overlapping kernels or leaves raise at init."""

    def init(key, params, sites) -> Partition:
        frozen, trainable = dict(params), {}
        for i, method in enumerate(methods):
            part = method.init(jax.random.fold_in(key, i) if i else key, frozen, sites)
            frozen, trainable = part.frozen, tree.merge(trainable, part.trainable)
        return Partition(frozen, trainable)

    def fold(params, sites):
        for method in methods:
            params = method.fold(params, sites)
        return params

    return Method(
        name=name or "+".join(m.name for m in methods),
        init=init,
        fold=fold,
        parts=tuple(p for m in methods for p in (m.parts or (m,))),
        needs=max((m.needs for m in methods), key=("product", "norms", "dense").index),
        config=config or {},
    )


def parts(method: Method) -> tuple[Method, ...]:
    return method.parts or (method,)
