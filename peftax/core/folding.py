"""A folded tree that is made one layer of one leaf at a time: held are the base as it lies and one kernel's numbers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from peftax.core import quantization, tree
from peftax.core.adapters import is_theta, together
from peftax.core.method import Method, chain, parts
from peftax.core.sites import Site, Sites


def by_layer(
    method: Method, params: tree.Tree, sites: Sites, *, pack: bool = False, like: tree.Tree | None = None
) -> tuple[dict[str, Any], Callable[[str, int | None], Any]]:
    """What `method.fold` gives, to be asked for: the same bits.

    Args:
      params: the base and the method's leaves.
      pack: kernels that are packed in `params` are packed again.
      like: the base as it was: its leaves that trained in float32 are as wide as they were there.

    Returns:
      (the folded tree as shapes; (a leaf's path, a layer of its stack or None: all of it) -> the leaf there).

    Raises:
      ValueError: what `method.fold` raises, before anything is made.
    """

    fold = method.fold
    if fold is None:
        raise ValueError(f"{method.name} is no change of weights; there is nothing to fold")

    def whole(params):
        folded = fold(params, sites)
        flat = tree.flatten(quantization.pack_like(folded, params) if pack else folded)
        return tree.unflatten(flat | {p: flat[p].astype(x.dtype) for p, x in own.items() if p in flat})

    own = tree.flatten(like or {})
    shapes = jax.eval_shape(whole, tree.abstract(params))
    flat, wanted, groups = tree.flatten(params), tree.flatten(shapes), _groups(sites)

    def read(path: str, layer: int | None) -> Any:
        here = _leaves(flat, groups.get(path, ()))
        x, was = (None if path not in flat else _of_layer(flat[path], layer)), None
        if (acting := _acting(method, here)) is not None:
            was = x
            cut = {p: _of_layer(x, layer) for p, x in here.items()} | _common(method, flat)
            assert acting.fold is not None  # a part of what folds
            x = tree.flatten(acting.fold(tree.unflatten(cut), _sites_of_layer(groups[path], layer)))[path]
        x, was = (v if layer is None else jax.tree.map(lambda x: x[0], v) for v in (x, was))
        if tree.is_packed(wanted[path]) and not tree.is_packed(x):
            assert x is not None and was is not None
            return quantization.like(x, was)
        assert x is not None
        return x.astype(wanted[path].dtype) if path in own else x

    return shapes, read


def largest(
    method: Method, params: tree.Tree, sites: Sites
) -> tuple[Callable[[tree.Tree], dict[str, Any]], dict[str, Any]]:
    """The dearest step of `by_layer`: (how one layer of the largest kernel that changes is folded, what it takes).

    Args:
      params: shapes.
    """
    flat, groups = tree.flatten(params), _groups(sites)
    found = [site for site in sites.values() if _acting(method, _leaves(flat, groups[site.kernel])) is not None]
    members = groups[max(found, key=lambda site: math.prod(site.shape)).kernel]
    own = _leaves(flat, members)
    acting, layer = _acting(method, own), 0 if members[0].scanned else None
    assert acting is not None and acting.fold is not None
    fold = functools.partial(acting.fold, sites=_sites_of_layer(members, layer))

    def of_layer(x: Any) -> Any:
        return x if layer is None else jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype, sharding=x.sharding)

    return fold, tree.unflatten({p: jax.tree.map(of_layer, x) for p, x in own.items()} | _common(method, flat))


def _groups(sites: Sites) -> dict[str, tuple[Site, ...]]:
    """{a leaf that folding may change: the sites that it comes from}: those of one kernel."""
    found = {}
    for site in sites.values():
        same = tuple(s for s in sites.values() if s.kernel == site.kernel)
        heads = [f"{s.path}/kernel" for s in same if s.kind == "head"]  # where a tied one is untied
        found |= dict.fromkeys([site.kernel, *(s.bias for s in same if s.bias), *heads], same)
    return found


def _leaves(flat: Mapping[str, Any], members: tuple[Site, ...]) -> dict[str, Any]:
    """The leaves of these sites: the base's own, and those of methods."""
    own = {p for s in members for p in (s.kernel, s.bias, f"{s.path}/kernel")}
    return {p: x for p, x in flat.items() if p in own or any(p.startswith(f"{s.path}/") for s in members)}


def _common(method: Method, flat: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that all sites share."""
    return {p: x for p, x in flat.items() for m in parts(method) if p.startswith(f"{m.name}/{m.adapter}/")}


def _acting(method: Method, own: Mapping[str, Any]) -> Method | None:
    """The parts of a method that have leaves here, as one; None where none has."""
    pieces = [m for m in parts(method) if any(is_theta(path, m) for path in own)]
    if not pieces:
        return None
    if any(m.share is not None for m in pieces):
        return together(*pieces, weights=[1.0 if m.share is None else m.share for m in pieces])
    return chain(*pieces)


def _of_layer(leaf: Any, layer: int | None) -> Any:
    """A stack of this one layer."""
    return leaf if layer is None else jax.tree.map(lambda x: x[layer : layer + 1], leaf)


def _sites_of_layer(members: tuple[Site, ...], layer: int | None) -> Sites:
    def of(site: Site) -> Site:
        first = next(iter(site.stacks), None)
        return site if layer is None else dataclasses.replace(site, stacks={**site.stacks, first: 1})

    return Sites({site.path: of(site) for site in members}, {}, {})
