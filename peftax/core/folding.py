"""A folded tree, made one layer of one leaf at a time: the base as it lies and one kernel's numbers are all that is held."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from peftax.core import quantization, tree
from peftax.core.adapters import is_theta, together
from peftax.core.method import Method, chain, parts
from peftax.core.sites import Site, Sites


def by_layer(
    method: Method, params: tree.Tree, sites: Sites, *, pack: bool = False
) -> tuple[dict[str, Any], Callable[[str, int | None], Any]]:
    """What `method.fold` gives, to be asked for: the same bits.

    Args:
      params: the base and the method's leaves.
      pack: kernels that are packed in `params` are packed again.

    Returns:
      (the folded tree as shapes; (a leaf's path, a layer of its stack or None: all of it) -> the leaf there).

    Raises:
      ValueError: what `method.fold` raises, before anything is made.
    """
    flat = tree.flatten(params)

    def whole(params):
        folded = method.fold(params, sites)
        return quantization.pack_like(folded, params) if pack else folded

    shapes = jax.eval_shape(whole, tree.abstract(params))
    wanted, groups = tree.flatten(shapes), _groups(sites)
    common = {p: x for p, x in flat.items() for m in parts(method) if p.startswith(f"{m.name}/{m.adapter}/")}

    def read(path: str, layer: int | None) -> Any:
        members = groups.get(path, ())
        at = tuple(f"{site.path}/" for site in members)
        own = {p: x for p, x in flat.items() if groups.get(p) is members or p.startswith(at)} if members else {}
        if (acting := _acting(method, own)) is not None:
            cut = {p: _layer(x, layer) for p, x in own.items()}
            folded = acting.fold(tree.unflatten(cut | common), _of_layer(members, layer))
            x = tree.flatten(folded)[path]
            x = x if layer is None else _first(x)
        else:
            x = flat[path] if layer is None else _first(_layer(flat[path], layer))
        if tree.is_packed(wanted[path]) and not tree.is_packed(x):
            x = quantization.like(x, flat[path] if layer is None else _first(_layer(flat[path], layer)))
        return x

    return shapes, read


def _groups(sites: Sites) -> dict[str, tuple[Site, ...]]:
    """{a leaf that folding may change: the sites that it comes from}: those of one kernel."""
    found = {}
    for site in sites.values():
        same = tuple(s for s in sites.values() if s.kernel == site.kernel)
        heads = [f"{s.path}/kernel" for s in same if s.kind == "head"]  # where a tied one is untied
        found |= dict.fromkeys([site.kernel, *(s.bias for s in same if s.bias), *heads], same)
    return found


def _acting(method: Method, own: dict[str, Any]) -> Method | None:
    """The parts of a method that have leaves here, as one; None where none has."""
    pieces = [m for m in parts(method) if any(is_theta(path, m) for path in own)]
    if not pieces:
        return None
    if any(m.share is not None for m in pieces):
        return together(*pieces, weights=[1.0 if m.share is None else m.share for m in pieces])
    return chain(*pieces)


def _of_layer(members: tuple[Site, ...], layer: int | None) -> Sites:
    """The sites of a stack of this one layer."""

    def of(site: Site) -> Site:
        first = next(iter(site.stacks), None)
        return site if layer is None else dataclasses.replace(site, stacks={**site.stacks, first: 1})

    return Sites({site.path: of(site) for site in members}, {}, {})


def _layer(leaf: Any, layer: int | None) -> Any:
    """A stack of this one layer."""
    return leaf if layer is None else jax.tree.map(lambda x: x[layer : layer + 1], leaf)


def _first(leaf: Any) -> Any:
    return jax.tree.map(lambda x: x[0], leaf)
