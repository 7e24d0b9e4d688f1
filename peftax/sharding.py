"""Where each array lies on a mesh with axes `data`, `fsdp`, `tensor` and `sequence`: base weights by rules, adapters by
their AXES, batches by rows and tokens.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from peftax.core import tree
from peftax.core.method import Method
from peftax.core.sites import Site, Sites, theta_of
from peftax.ops import batch
from peftax.ops.qtensor import QTensor

BATCH = PartitionSpec(("data", "fsdp"), "sequence")  # [B, T]
SHARED = ("fsdp", "sequence")  # devices that differ in these alone would else hold the same weights
ROWS = r"(^|/)(o_proj|down_proj)/kernel$"  # kernels whose input other kernels' split columns are


def make_mesh(
    *, data: int = 1, fsdp: int = -1, tensor: int = 1, sequence: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all devices; one of the sizes may be -1: what is left.

    Raises ValueError when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
    if list(sizes.values()).count(-1) > 1:
        raise ValueError("mesh: only one of data, fsdp, tensor and sequence may be -1")
    if any(s < 1 and s != -1 for s in sizes.values()):
        raise ValueError(f"mesh: {_told(sizes)}: a size is a number of devices, or -1: what is left")
    known = math.prod(s for s in sizes.values() if s != -1)
    sizes = {name: len(devices) // known if s == -1 else s for name, s in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh: {_told(sizes)} is not the number of devices, {len(devices)}")
    return Mesh(np.asarray(devices).reshape(*sizes.values()), tuple(sizes))


def _told(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{name}={s}" for name, s in sizes.items())


def of_batch(shape: tuple[int, ...], mesh: Mesh, *, parts: bool = False) -> NamedSharding:
    """Where an array of a batch lies: [B], [B, T]; with `parts` (of an accumulated step) another axis is in front.

    An axis that the mesh does not divide is whole: of a number a row, [B, 1], the second.
    """
    axes = (*(None,) * parts, *BATCH, *(None,) * len(shape))[: len(shape)]
    return NamedSharding(mesh, PartitionSpec(*(_fitting(mesh, a, n) for a, n in zip(axes, shape, strict=True))))


def base_specs(
    params: Mapping[str, Any], sites: Sites, mesh: Mesh, rules: Sequence[tuple[str, Any]] = ()
) -> dict[str, PartitionSpec]:
    """{path: spec} of the base, every axis named: the first rule (regex on the path, spec) that matches, else

      over tensor: the columns of a linear layer's kernel, its rows where ROWS is found in the path; the columns of a
                   table, its rows where it is the head too
      over fsdp:   the largest other axis of a leaf that has two; over sequence too, where both divide it

    Scanned axes are never split; an axis that a mesh axis does not divide stays whole.

    Raises ValueError for a rule that names no axis of the mesh or one twice, matches nothing, or splits what its mesh
    axes do not divide.
    """
    _check(params, sites, mesh, rules)
    side = {s.kernel: 1 for s in sites.values() if s.kind in ("linear", "embed") and s.perm == (0, 1) and not s.n_stack}
    side |= {s.kernel: 0 for s in sites.values() if s.kind == "head" or re.search(ROWS, s.kernel) and s.kernel in side}
    specs = {}
    for path, leaf in tree.flatten(params).items():
        rule = next((spec for pattern, spec in rules if re.search(pattern, path)), None)
        if rule is not None:
            specs[path] = PartitionSpec(*rule, *(None,) * (leaf.ndim - len(rule)))
            continue
        skip = _scanned(path, sites)
        own = leaf.shape[skip:]
        axes: list[Any] = [None] * len(own)
        if path in side and mesh.shape["tensor"] > 1 and own[side[path]] % mesh.shape["tensor"] == 0:
            axes[side[path]] = "tensor"
        for shared in (SHARED, "fsdp") if mesh.shape["sequence"] > 1 else ("fsdp",):
            free = [i for i, n in enumerate(own) if axes[i] is None and _fitting(mesh, shared, n)]
            if len(own) > 1 and free:
                axes[max(free, key=lambda i: own[i])] = shared
                break
        specs[path] = PartitionSpec(*(None,) * skip, *axes)
    return specs


def _check(params: Mapping[str, Any], sites: Sites, mesh: Mesh, rules: Sequence[tuple[str, Any]]) -> None:
    """Raise ValueError for a rule of config.mesh.rules that cannot be followed."""
    leaves = tree.flatten(params)
    taken: set[str] = set()  # by rules before it
    for rule in rules:
        if isinstance(rule, str) or len(rule) != 2 or isinstance(rule[1], str):
            raise ValueError(f"mesh: rule {rule!r} is no pair; want (regex, PartitionSpec as a tuple)")
        pattern, spec = rule
        told, named = f"mesh: rule {pattern!r}", jax.tree.leaves(tuple(spec))
        for axis in named:
            if axis not in mesh.shape:
                raise ValueError(
                    f"{told} names {axis!r}, no axis of the mesh ({', '.join(mesh.shape)}); "
                    f"nearest: {tree.nearest(str(axis), mesh.shape)}"
                )
            if named.count(axis) > 1:
                raise ValueError(f"{told} names {axis!r} twice; a mesh axis splits one axis of an array")
        hits = {path for path in leaves if re.search(pattern, path)}
        if not hits:
            raise ValueError(f"{told} matches no parameter; nearest: {tree.nearest(pattern, leaves)}")
        for path in sorted(hits - taken):
            shape = leaves[path].shape
            if len(spec) > len(shape):
                raise ValueError(f"{told} names {len(spec)} axes of {path!r}, which has {len(shape)}")
            for i, (n, axes) in enumerate(zip(shape, spec, strict=False)):
                if axes is not None and _fitting(mesh, axes, n) is None:
                    over = _told({a: mesh.shape[a] for a in jax.tree.leaves(axes)})
                    others = [j for j in range(_scanned(path, sites), len(shape)) if _fitting(mesh, axes, shape[j])]
                    near = f"axis {others[-1]}, {shape[others[-1]]}, can be split so" if others else "leave it whole"
                    raise ValueError(
                        f"{told} splits axis {i} of {path!r}, {n}, over {over}, which do not divide it; {near}"
                    )
        taken |= hits


def _scanned(path: str, sites: Sites) -> int:
    """How many axes of a leaf number scanned layers."""
    return sum(path.startswith(stack + "/") for stack in sites.stacks)


def of_leaf(leaf: Any, spec: PartitionSpec, mesh: Mesh) -> Any:
    """The NamedSharding of a leaf; of a packed weight one for each of its arrays, that lie as the kernel lies.

    Scales of groups that a device's share would cut lie over the columns instead. An axis that cannot be split stays
    whole.
    """
    if not isinstance(leaf, QTensor):
        return NamedSharding(mesh, spec)
    *lead, n_in, n_out = [*spec, *(None,) * (leaf.ndim - len(spec))]
    of_groups, blocks = (n_in, None, n_out), leaf.scale.shape[-3]
    if blocks > 1 and n_out is None and _fitting(mesh, n_in, blocks) is None:
        of_groups = (None, None, n_in)

    def place(name: str, x: Any) -> NamedSharding:
        axes = {"packed": (n_in, n_out), "scale": of_groups, "low": of_groups}.get(name, ())
        axes = [*lead, *axes, *(None,) * (x.ndim - len(lead) - len(axes))]
        return NamedSharding(mesh, PartitionSpec(*(_fitting(mesh, a, n) for a, n in zip(axes, x.shape, strict=True))))

    return jax.tree_util.tree_map_with_path(lambda path, x: place(path[0].name, x), leaf)


def theta_spec(path: str, shape: tuple[int, ...], method: Method, sites: Sites, base, mesh: Mesh):
    """An adapter leaf follows its kernel: its "in" and "out" axes and its experts lie as the kernel's, every other
    axis is whole.

    A block has no kernel: there they lie over fsdp. What all sites share is whole on every device.
    """
    place, _, axes = theta_of(path, method, sites)
    named: dict[str, Any] = {} if place is None else {"in": "fsdp", "out": "fsdp"}
    stack: list[Any] = [None] * len(place.stack if place else ())
    if isinstance(place, Site):
        kernel = list(base[place.kernel]) + [None] * (place.ndim - len(base[place.kernel]))
        own = [kernel[len(place.scanned) + p] for p in place.perm]
        experts, own = own[: place.n_stack], own[place.n_stack :]
        named = {"in": _first(own[: place.n_in]), "out": _first(own[place.n_in :])}
        if experts:
            stack[-1] = experts[0]
    spec = stack + [named.get(a) for a in axes]
    spec += [None] * (len(shape) - len(spec))
    return PartitionSpec(*(_fitting(mesh, s, n) for s, n in zip(spec, shape, strict=True)))


def _fitting(mesh: Mesh, axes: Any, n: int) -> Any:
    """The mesh axes, or None where they do not divide n."""
    return None if n % batch.parts(mesh, axes) else axes


def _first(axes):
    return next((a for a in axes if a is not None), None)


def shardings(
    part_tree: Mapping[str, Any], method: Method, sites: Sites, base: Mapping[str, Any], mesh: Mesh
) -> dict[str, Any]:
    """A tree of NamedSharding for one half of a partition; `base` is what base_specs gave."""
    out = {}
    for path, leaf in tree.flatten(part_tree).items():
        spec = base[path] if path in base else theta_spec(path, leaf.shape, method, sites, base, mesh)
        out[path] = of_leaf(leaf, spec, mesh)
    return tree.unflatten(out)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Leaves that differ in their layer's number alone: how they lie, and bytes of them all on one device.

    whole: mesh axes that could split a matrix of the base and do not: they do not divide it, or a rule has it so.
    """

    path: str
    leaves: int
    shape: tuple[int, ...]
    spec: PartitionSpec
    bytes: int
    whole: tuple[str, ...]


def report(
    half: Mapping[str, Any], places: Mapping[str, Any], sites: Sites, base: Mapping[str, Any], mesh: Mesh
) -> list[Kind]:
    """The leaves of one half of a partition by kind; `places` is what shardings gave, `base` what base_specs did."""
    found: dict[str, Kind] = {}
    lies = tree.flatten(places)
    for path, x in tree.flatten(half).items():
        kind = "/".join("*" if p.isdigit() else p for p in path.split("/"))
        at = lies[path].packed if tree.is_packed(x) else lies[path]
        share = jax.tree.map(
            lambda x, at: math.prod(at.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize, x, lies[path]
        )
        matrix = path in base and len(x.shape) - _scanned(path, sites) > 1
        could = [a for a in ("fsdp", "tensor", "sequence") if matrix and mesh.shape[a] > 1]
        whole = tuple(a for a in could if a not in jax.tree.leaves(tuple(at.spec)))
        before = found.get(kind)
        leaves, size = (0, 0) if before is None else (before.leaves, before.bytes)
        found[kind] = Kind(kind, leaves + 1, tuple(x.shape), at.spec, size + sum(jax.tree.leaves(share)), whole)
    return list(found.values())
