"""Rules that put kernels into few bits: which, in what format, and what it saves."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax

from peftax.core import tree
from peftax.core.sites import Sites
from peftax.ops.qtensor import GROUPS, LEVELS, QTensor
from peftax.ops.quantize import quantize as quantize_one

Rules = Sequence[tuple[str, Mapping[str, Any] | None]]
AS_FILED = "file"  # the format in which the file holds it


def match(rules: Rules, sites: Sites) -> dict[str, Mapping[str, Any]]:
    """{kernel's path: the settings of the first rule whose regex is found in it}, of linear layers' kernels.

    A rule of int8 takes tables too, whose rows then have a scale each; other formats pass them by.

    Raises ValueError for a rule that is malformed or matches nothing.
    """
    kernels = sorted({s.kernel for s in sites.values() if s.kind == "linear" and _plain(s)})
    tables = sorted({s.kernel for s in sites.values() if s.kind == "embed" and _plain(s)})
    found: dict[str, Mapping[str, Any] | None] = {}
    for rule in rules:
        if isinstance(rule, str) or len(rule) != 2 or not isinstance(rule[1], Mapping | None):
            raise ValueError(f"quantize: rule {rule!r} is no pair; want (regex, {{'fmt': ...}}) or (regex, None)")
        pattern, settings = rule
        _check(pattern, settings)
        hits = [k for k in kernels if re.search(pattern, k)]
        named = [k for k in tables if re.search(pattern, k)]
        if settings is None or settings["fmt"] == "int8":
            hits += named
        if not hits:
            others = sorted(s.kernel for s in sites.values() if re.search(pattern, s.kernel))
            kinds = "; only kernels of two axes in linear layers are packed" if others else ""
            kinds += ", and tables in int8" if named else ""
            near = tree.nearest(pattern, kernels)
            raise ValueError(f"quantize: rule {pattern!r} matches no linear kernel{kinds}; nearest: {near}")
        for k in hits:
            found.setdefault(k, {**settings, "by_row": True} if settings and k in tables else settings)
    return {k: s for k, s in found.items() if s is not None}


def _plain(site) -> bool:
    return site.perm == (0, 1) and site.n_in == 1 and not site.n_stack


def _check(pattern: str, settings: Mapping[str, Any] | None) -> None:
    if settings is None:
        return
    wrong = sorted(settings.keys() - {"fmt", "group", "double"})
    if wrong or "fmt" not in settings:
        raise ValueError(f"quantize: rule {pattern!r} has keys {sorted(settings)}; want fmt, and group or double")
    if settings["fmt"] not in (*LEVELS, AS_FILED):
        near = tree.nearest(settings["fmt"], (*LEVELS, AS_FILED))
        raise ValueError(f"quantize: rule {pattern!r} wants format {settings['fmt']!r}; nearest: {near}")


def quantize(params: tree.Tree, rules: Rules, sites: Sites) -> dict[str, Any]:
    """The tree with the matching kernels packed, one at a time; see `match`. Works on shapes too, without computing."""
    return pack(params, match(rules, sites))


def pack(params: tree.Tree, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The tree with the kernels of `wanted` in their formats; one that is packed already stays."""
    flat = tree.flatten(params)
    for path, settings in wanted.items():
        if not tree.is_packed(flat[path]):
            flat[path] = _pack(path, flat[path], settings)
    return tree.unflatten(flat)


def _pack(path: str, kernel: Any, settings: Mapping[str, Any]) -> QTensor:
    if settings["fmt"] == AS_FILED:
        raise ValueError(f"quantize: {path!r} is to be as its file holds it, and there is no file; name a format")
    one: Callable = partial(quantize_one, **settings)
    try:
        if isinstance(kernel, jax.ShapeDtypeStruct):
            return jax.eval_shape(one, kernel)
        return jax.jit(one)(kernel)
    except ValueError as error:
        raise ValueError(f"quantize: {path!r}: {str(error).removeprefix('quantize: ')}") from error


def like(w: jax.Array, packed: QTensor) -> QTensor:
    """w in the format of `packed`."""
    if packed.turned:
        return like(w.swapaxes(-1, -2), packed.T).T
    group = None if None in GROUPS[packed.fmt] else packed.group
    made = quantize_one(w, packed.fmt, group=group, double=packed.double, by_row=packed.by_row)
    return dataclasses.replace(made, dtype=packed.dtype, kernel=packed.kernel)


def pack_like(params: tree.Tree, base: tree.Tree) -> dict[str, Any]:
    """Kernels that are packed in `base` packed in `params` too."""
    was, flat = tree.flatten(base), tree.flatten(params)
    again = {p: like(x, was[p]) for p, x in flat.items() if tree.is_packed(was.get(p)) and not tree.is_packed(x)}
    return tree.unflatten({**flat, **again})


def report(before: tree.Tree, after: tree.Tree) -> str:
    """Bytes before and after, and bits a weight of what was packed."""
    was, now = tree.flatten(before), tree.flatten(after)
    packed = {path: x for path, x in now.items() if isinstance(x, QTensor)}
    lines = []
    for fmt in sorted({x.fmt for x in packed.values()}):
        own = {p: x for p, x in packed.items() if x.fmt == fmt}
        weights = sum(x.size for x in own.values())
        old = tree.nbytes({p: was[p] for p in own})
        size = tree.nbytes(own)
        told = f"{old:,} -> {size:,} bytes, {8 * size / weights:.3f} bits each"
        lines.append(f"{fmt}: {len(own)} kernels, {weights:,} weights, {told}")
    lines.append(f"all: {tree.nbytes(before):,} -> {tree.nbytes(after):,} bytes")
    return "\n".join(lines)
