"""Adapters as values: several on one base tree, under names, and what can be done with them there.

A method built with `adapter="blue"` acts through the leaves at <place>/<method>/blue and through no others, so that

  params = add(params, red, part)           stands beside what is there already
  inject(apply, red)                        lets this one act; others do nothing
  inject(apply, together(red, blue))        lets both act: their changes add up
  inject(apply, together(red, weights=[-1]))   is the base minus the adapter
  inject(apply, chain())                    lets none act
  params = remove(params, red)              takes it off

and a site that holds no leaves of the acting adapter is the plain product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import tree
from peftax.core.method import Method, Partition, chain, parts
from peftax.core.sites import Place, Site, Sites, real_shape, theta_of
from peftax.ops.qtensor import dense


def is_theta(path: str, method: Method) -> bool:
    """Is this leaf one of the method's adapter's own?"""
    bits = path.split("/")
    return len(bits) > 2 and any(m.call and [m.name, m.adapter] == bits[-3:-1] for m in parts(method))


def own_leaves(part: Partition, method: Method) -> dict[str, Any]:
    """{path: leaf} of the method's adapter, trainable and frozen ones."""
    return {path: x for half in part for path, x in tree.flatten(half).items() if is_theta(path, method)}


def add(params: tree.Tree, method: Method, part: Partition) -> dict[str, Any]:
    """The tree with the adapter's leaves in it, trainable and frozen ones.

    Raises ValueError where the adapter changes the base itself, or the tree holds one of that name.
    """
    refuse_whole(method, part)
    theta = own_leaves(part, method)
    held = tree.flatten(params).keys() & theta.keys()
    if held:
        raise ValueError(
            f"add: the tree holds {sorted(held)[0]!r} already; give the adapter another name (adapter=...) or "
            "remove() the one that is there"
        )
    return tree.merge(params, tree.unflatten(theta))


def remove(params: tree.Tree, method: Method) -> dict[str, Any]:
    """The tree without the adapter's leaves. Raises ValueError where it holds none."""
    rest, theta = tree.split(params, lambda path: is_theta(path, method))
    if not theta:
        raise ValueError(f"remove: the tree holds no leaves of {_title(method)}")
    return rest


def together(*methods: Method, weights: Sequence[float] | None = None) -> Method:
    """Several adapters that act at once, at one kernel too: what each changes is added up, times its weight.

      y = x W + b + Σ_i w_i (y_i - (x W + b))        W' = W + Σ_i w_i (W_i - W),  b' likewise

    Args:
      methods: with leaves under names of their own; of any methods.
      weights: one for each, also negative; None: 1.

    Returns:
      A Method; init makes all of them on one base.

    Raises:
      ValueError: two of them have one name, or one with a weight is no change of weights.
    """
    shares = [1.0] * len(methods) if weights is None else list(weights)
    if len(shares) != len(methods):
        raise ValueError(f"together: {len(methods)} adapters and {len(shares)} weights; give one for each")
    pieces = []
    for method, share in zip(methods, shares, strict=True):
        for piece in parts(method):
            changes_weights = piece.call is not None and piece.fold is not None
            if piece.call is not None and not changes_weights and share != 1:
                raise ValueError(f"together: {_title(piece)} is no change of weights and takes no weight but 1")
            pieces.append(dataclasses.replace(piece, share=float(share)) if changes_weights else piece)
    named = [(p.name, p.adapter) for p in pieces if p.call is not None]
    for name, adapter in named:
        if named.count((name, adapter)) > 1:
            raise ValueError(
                f"together: two of {name} are named {adapter!r}; give each a name of its own (adapter=...)"
            )

    def fold(params, sites):
        return _folded(params, [p for p in pieces if p.call is not None], sites)

    whole = chain(*pieces)
    return dataclasses.replace(whole, fold=None if whole.fold is None else fold)


def _folded(params, pieces: Sequence[Method], sites: Sites) -> dict[str, Any]:
    flat = tree.flatten(params)
    base = dict(flat)
    for piece in sorted(pieces, key=lambda piece: piece.tied):  # those that change both last, once any is untied
        assert piece.share is not None
        for site, dw, db in changes(params, piece, sites):
            heads = tied(site, sites)
            own = f"{heads[0].path}/kernel" if heads else ""
            if heads and piece.tied:  # the head follows the table, in a kernel of its own where another piece untied it
                if own in flat:
                    flat[own] = (flat[own] + piece.share * dw[0].T).astype(flat[own].dtype)
            elif heads:  # untie: the head gets a kernel of its own
                flat.setdefault(own, dense(heads[0].matrix(base[site.kernel]))[0])
                if site is heads[0]:
                    flat[own] = (flat[own] + piece.share * dw[0]).astype(flat[own].dtype)
                    continue
            new = site.matrix(_wide(flat[site.kernel])) + piece.share * dw
            flat[site.kernel] = site.unmatrix(new, base[site.kernel].shape).astype(base[site.kernel].dtype)
            if db is not None and site.bias is not None:
                b = flat[site.bias]
                flat[site.bias] = (b + piece.share * db.reshape(b.shape)).astype(b.dtype)
        flat = {path: x for path, x in flat.items() if not is_theta(path, piece)}
    return tree.unflatten(flat)


def changes(params: tree.Tree, method: Method, sites: Sites) -> Iterator[tuple[Site, jax.Array, jax.Array | None]]:
    """What folding changes, site by site: (site, ΔW [L, in, out] f32, Δb [L, out] or None), L counting layers.

    Raises ValueError where the method does not fold, or the tree holds none of its leaves.
    """
    flat, found = tree.flatten(params), False
    for piece in parts(method):
        if piece.call is None:
            continue
        if piece.fold is None:
            raise ValueError(f"{_title(piece)} is no change of weights")
        shared = {p: x for p, x in flat.items() if p.startswith(f"{piece.name}/{piece.adapter}/")}
        for site in sites.values():
            at = f"{site.path}/{piece.name}/{piece.adapter}/"
            theta = {p: x for p, x in flat.items() if p.startswith(at)}
            if not theta:
                continue
            found = True
            own = {p: _wide(flat[p]) for p in (site.kernel, site.bias) if p is not None}
            after = tree.flatten(piece.fold(tree.unflatten({**own, **theta, **shared}), sites))
            w = site.matrix(own[site.kernel])
            if heads := [h for h in tied(site, sites) if h is site]:
                dw = after[f"{heads[0].path}/kernel"][None] - w
            else:
                dw = site.matrix(after[site.kernel]) - w
            db = (after[site.bias] - own[site.bias]).reshape(len(site.layers), -1) if site.bias else None
            yield site, dw, db
    if not found:
        raise ValueError(f"the tree holds no leaves of {_title(method)}")


def tied(site: Site, sites: Sites) -> list[Site]:
    """The head whose kernel is the table that another site looks up; nothing where the site's kernel is its own."""
    same = [s for s in sites.values() if s.kernel == site.kernel]
    return [s for s in same if s.kind == "head"] if len(same) > 1 else []


def _wide(leaf: Any) -> jax.Array:
    return dense(leaf.astype(jnp.float32))


def refuse_whole(method: Method, part: Partition) -> None:
    """Raise ValueError where the adapter changes the base itself, which others beside it would see."""
    whole = [p for p in tree.flatten(part.trainable) if not is_theta(p, method)]
    if whole:
        raise ValueError(
            f"{_title(method)} trains {whole[0]!r} of the base itself ({len(whole)} leaves) and cannot stand beside "
            "others; fold it, or train without modules_to_save and bias"
        )
    if method.move is not None:
        raise ValueError(
            f"{_title(method)} stands on a base that its start moved (init={method.config.get('init')!r}); save it: "
            "its folder is an adapter of the untouched base"
        )


def _title(method: Method) -> str:
    return " + ".join(f"{m.name} {m.adapter!r}" for m in parts(method) if m.call is not None) or method.name


# --- one layer's part of a leaf -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Slot:
    """One layer's part of a leaf: where it lies in the tree, and whose it is; name "" where all sites share it.

    experts: how many kernels its module stacks; 0 where it has one.
    window:  a convolution's sizes in space.
    """

    path: str
    index: tuple
    shape: tuple[int, ...]
    name: str
    leaf: str
    kind: str
    experts: int = 0
    window: tuple[int, ...] = ()


def slots(theta: Mapping[str, Any], piece: Method, method: Method, sites: Sites) -> Iterator[Slot]:
    """Every layer's part of one method's leaves, without padding, in the order in which the model calls its sites.

    theta: {path: leaf}.
    """
    order = {path: i for i, path in enumerate(sites)}
    for path, leaf in sorted(theta.items(), key=lambda item: order.get(item[0].rsplit("/", 3)[0], -1)):
        place, own_piece, axes = theta_of(path, method, sites)
        last = path.rsplit("/", 1)[-1]
        if own_piece is not piece or last not in piece.axes:
            continue
        if place is None:
            yield Slot(path, (), tuple(leaf.shape), "", last, "shared")
            continue
        yield from _layers(path, leaf, last, place, piece, axes)


def _layers(path: str, leaf: Any, last: str, place: Place, piece: Method, axes) -> Iterator[Slot]:
    own = leaf.shape[len(place.stack) :]
    experts = place.stack[-1] if isinstance(place, Site) and place.n_stack else 0
    window = place.window if isinstance(place, Site) else ()
    for layer, name in enumerate(place.names):
        settings = piece.settings(name, place.kind) if piece.settings else {}
        if settings is None:
            continue
        shape = real_shape(settings, axes, own)
        at = np.unravel_index(layer, place.stack) if place.stack else ()
        index = (*at, *(slice(n) for n in shape))
        yield Slot(path, index, shape, name, last, place.kind, experts, window)


def layers(method: Method, part: Partition, sites: Sites) -> dict[str, dict[str, np.ndarray]]:
    """{Hugging Face module name: {leaf: one layer's float32 numbers, without padding}} of an adapter, on the host."""
    theta = {path: np.asarray(jax.device_get(x)) for path, x in own_leaves(part, method).items()}
    found: dict[str, dict[str, np.ndarray]] = {}
    for piece in parts(method):
        for slot in slots(theta, piece, method, sites):
            if slot.name:
                found.setdefault(slot.name, {})[slot.leaf] = theta[slot.path][slot.index]
    return found


def layers_of(leaves: Sequence[str], method: Method, part: Partition, sites: Sites) -> dict[str, dict[str, np.ndarray]]:
    """`layers` of an adapter that changes the base by these leaves alone.

    Raises ValueError naming another, or where the adapter changes the base itself.
    """
    refuse_whole(method, part)
    found = layers(method, part, sites)
    for name, own in found.items():
        if more := sorted(own.keys() - set(leaves)):
            raise ValueError(
                f"{_title(method)} holds {more[0]!r} at {name!r}, which {', '.join(leaves)} cannot say and would be "
                "lost; fold it, or train without b_bias and tokens"
            )
    return found


def filled(method: Method, part: Partition, sites: Sites, values: Mapping[str, Mapping[str, np.ndarray]]) -> Partition:
    """The partition with these numbers in its leaves; the inverse of `layers`. What is not named is zero."""
    halves, theta = [tree.flatten(half) for half in part], own_leaves(part, method)
    new: dict[str, np.ndarray] = {}
    for piece in parts(method):
        for slot in slots(theta, piece, method, sites):
            if slot.path not in new:
                new[slot.path] = np.zeros(theta[slot.path].shape, theta[slot.path].dtype)
            if slot.leaf in values.get(slot.name, ()):
                new[slot.path][slot.index] = values[slot.name][slot.leaf]
    return Partition(
        *(
            tree.unflatten({p: jnp.asarray(new.get(p, x)) if p in new else x for p, x in half.items()})
            for half in halves
        )
    )
