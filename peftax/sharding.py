"""Where each array lies on a mesh with axes `data`, `fsdp` and `tensor`: base weights by rules, adapters by their AXES,
the rest by theirs.
"""

from __future__ import annotations

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
from peftax.ops.qtensor import QTensor

BATCH = PartitionSpec(("data", "fsdp"))
ROWS = r"(^|/)(o_proj|down_proj)/kernel$"  # kernels whose input other kernels' split columns are


def make_mesh(*, data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices; one of the sizes may be -1: what is left.

    Raises ValueError when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    if list(sizes.values()).count(-1) > 1:
        raise ValueError("mesh: only one of data, fsdp and tensor may be -1")
    known = math.prod(s for s in sizes.values() if s != -1)
    sizes = {name: len(devices) // known if s == -1 else s for name, s in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        told = " x ".join(f"{name}={s}" for name, s in sizes.items())
        raise ValueError(f"mesh: {told} is not the number of devices, {len(devices)}")
    return Mesh(np.asarray(devices).reshape(*sizes.values()), tuple(sizes))


def base_specs(
    params: Mapping[str, Any], sites: Sites, mesh: Mesh, rules: Sequence[tuple[str, Any]] = ()
) -> dict[str, PartitionSpec]:
    """{path: spec} of the base, every axis named: the first rule (regex on the path, spec) that matches, else

      over tensor: the columns of a linear layer's kernel, its rows where ROWS is found in the path
      over fsdp:   the largest other axis of a leaf that has two

    Scanned axes are never split; an axis that a mesh axis does not divide stays whole.
    """
    linear = {s.kernel for s in sites.values() if s.kind == "linear" and s.perm == (0, 1) and not s.n_stack}
    specs = {}
    for path, leaf in tree.flatten(params).items():
        rule = next((spec for pattern, spec in rules if re.search(pattern, path)), None)
        if rule is not None:
            if len(rule) > leaf.ndim:
                raise ValueError(f"mesh: a rule names {len(rule)} axes of {path!r}, which has {leaf.ndim}")
            specs[path] = PartitionSpec(*rule, *(None,) * (leaf.ndim - len(rule)))
            continue
        skip = sum(path.startswith(stack + "/") for stack in sites.stacks)
        own = leaf.shape[skip:]
        axes: list[str | None] = [None] * len(own)
        side = 0 if re.search(ROWS, path) else 1
        if path in linear and mesh.shape["tensor"] > 1 and own[side] % mesh.shape["tensor"] == 0:
            axes[side] = "tensor"
        free = [i for i, n in enumerate(own) if axes[i] is None and n % mesh.shape["fsdp"] == 0]
        if len(own) > 1 and free:
            axes[max(free, key=lambda i: own[i])] = "fsdp"
        specs[path] = PartitionSpec(*(None,) * skip, *axes)
    return specs


def of_leaf(leaf: Any, spec: PartitionSpec, mesh: Mesh) -> Any:
    """The NamedSharding of a leaf; of a packed weight one for each of its arrays, that lie as the kernel lies.

    An axis that cannot be split stays whole: of scales, when a device's share would be less than a group.
    """
    if not isinstance(leaf, QTensor):
        return NamedSharding(mesh, spec)
    *lead, n_in, n_out = [*spec, *(None,) * (leaf.ndim - len(spec))]

    def place(name: str, x: Any) -> NamedSharding:
        axes = {"packed": (n_in, n_out), "scale": (n_in, None, n_out), "low": (n_in, None, n_out)}.get(name, ())
        axes = [*lead, *axes, *(None,) * (x.ndim - len(lead) - len(axes))]
        whole = [n % _size(mesh, a) for a, n in zip(axes, x.shape, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*(None if w else a for a, w in zip(axes, whole, strict=True))))

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
    whole = [shape[i] % _size(mesh, s) for i, s in enumerate(spec)]
    return PartitionSpec(*(None if w else s for s, w in zip(spec, whole, strict=True)))


def _size(mesh: Mesh, axes: Any) -> int:
    """Into how many parts these mesh axes (one, several, none) split an axis."""
    return math.prod(mesh.shape[a] for a in jax.tree.leaves(axes))


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
