"""LoRA adapters made of others: weighted combinations, fewer ranks, and LoRA in place of another method.

  combine   several LoRA adapters as one, in each of the ways of Hugging Face PEFT's add_weighted_adapter
  truncate  a LoRA adapter in fewer ranks: the best ones, by an SVD of A B that never makes it
  convert   what any method makes of the weights, as LoRA: the best ranks of fold(W) - W

What comes out has scale 1 (alpha = rank). All of it happens once, on the host, layer by layer, in float32 and numpy.

Source: ties: https://arxiv.org/abs/2306.01708, section 3; dare: https://arxiv.org/abs/2311.03099, eq. 3; cat, svd and
magnitude_prune as in PEFT's add_weighted_adapter, convert as in its convert_to_lora. Departs from PEFT: a site keeps
its real rank where PEFT pads it with zeros; one adapter alone goes through the asked kind, there through linear;
clamp's quantile is of magnitudes, there of numbers whose signs are the SVD's chance.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from peftax import methods
from peftax.core import adapters, tree
from peftax.core.method import Method, Partition, parts
from peftax.core.sites import Sites
from peftax.core.targets import Targets

RULES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
KINDS = ("cat", "svd", *RULES, *(f"{rule}_svd" for rule in RULES[1:]))
Factors = tuple[np.ndarray, np.ndarray]  # a [in, rank], b [rank, out]


class Made(NamedTuple):
    """An adapter, and what its ranks leave out: {module name: (‖ΔW - A B‖, ‖ΔW‖)}, Frobenius norms."""

    method: Method
    part: Partition
    errors: dict[str, tuple[float, float]]

    @property
    def error(self) -> float:
        """The relative error over all sites: sqrt(Σ ‖ΔW - A B‖² / Σ ‖ΔW‖²)."""
        left, whole = (math.sqrt(sum(n[i] ** 2 for n in self.errors.values())) for i in (0, 1))
        return left / whole if whole else 0.0


def combine(
    several: Sequence[tuple[Method, Partition]],
    weights: Sequence[float],
    sites: Sites,
    *,
    kind: str = "svd",
    adapter: str = "default",
    rank: int | None = None,
    density: float | None = None,
    majority: str = "total",
    clamp: float | None = None,
    seed: int = 0,
) -> Made:
    """Several LoRA adapters of one base as one.

      cat                  A = [w_i s_i A_i], B = [B_i]: Σ w_i s_i A_i B_i exactly, the ranks add up
      svd                  the best `rank` ranks of that sum
      linear               A = Σ sign(w_i) sqrt(|w_i| s_i) A_i, B = Σ sqrt(|w_i| s_i) B_i, of equal ranks: a rough
                           sum, since every A_i meets every B_j
      ties, dare_linear, dare_ties, magnitude_prune     as linear, of pruned A_i and B_i
      ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd     of pruned ΔW_i, then the best `rank` ranks

    Args:
      several: (method, partition) of each, as `init` and `load` give them.
      weights: one for each; a negative one subtracts.
      adapter: the result's name.
      rank: of the kinds with an svd; None: the largest of the adapters'.
      density: of the kinds that prune, what share of the numbers stays, in (0, 1].
      majority: of ties, who elects the sign: "total" (the sum) or "frequency" (each number one vote).
      clamp: of the kinds with an svd, the quantile in (0.5, 1] at which large numbers of both factors are cut.
      seed: of dare's random numbers.

    Raises:
      ValueError: an adapter is no LoRA, changes the base itself, biases or rows of tokens; kinds, ranks or weights that
        do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"combine: kind {kind!r} is none of {', '.join(KINDS)}")
    if not several or len(several) != len(weights):
        raise ValueError(f"combine: {len(several)} adapters and {len(weights)} weights; give one for each")
    rule = "linear" if kind in ("cat", "svd") else kind.removesuffix("_svd")
    if rule != "linear" and not (density is not None and 0 < density <= 1):
        raise ValueError(f"combine: {kind} wants a density in (0, 1], got {density}")
    if majority not in ("total", "frequency"):
        raise ValueError(f"combine: majority {majority!r} is neither 'total' nor 'frequency'")
    if clamp is not None and not 0.5 < clamp <= 1:
        raise ValueError(f"combine: clamp {clamp} is a quantile and must lie in (0.5, 1]")
    if rank is not None:
        _check_rank("combine", rank)
    each = [_factors(method, part, sites) for method, part in several]
    drawn = np.random.default_rng(seed)
    top = rank or max(a.shape[1] for layers in each for a, _, _ in layers.values())
    layers: dict[str, Factors] = {}
    errors = {}
    for name in [n for n in sites.by_name() if any(n in layers for layers in each)]:
        here = [(*layers[name], w) for layers, w in zip(each, weights, strict=True) if name in layers]
        if kind == "cat" or kind == "svd":
            a = np.concatenate([w * s * a for a, _, s, w in here], axis=1)
            b = np.concatenate([b for _, b, _, _ in here])
        elif kind.endswith("_svd"):
            ws = [w for *_, w in here]
            dense = _merge(rule, [s * (a @ b) for a, b, s, _ in here], ws, density, majority, drawn)
            a, b = dense, np.eye(dense.shape[1], dtype=np.float32)
        else:
            a, b = _merge_factors(rule, here, name, density, majority, drawn)
        if kind.endswith("svd"):
            (a, b), errors[name] = _best(a, b, top, dense=kind != "svd")
            a, b = (a, b) if clamp is None else _clamped(a, b, clamp)
        layers[name] = a, b
    return Made(*_lora(layers, several, sites, adapter), errors)


def truncate(method: Method, part: Partition, sites: Sites, rank: int | float, *, adapter: str = "default") -> Made:
    """A LoRA adapter in fewer ranks.

      s A B = Q_a R_a (Q_b R_b)ᵀ,  and of the small s R_a R_bᵀ the largest singular values

    Args:
      rank: an int; or a share in (0, 1] of each site's energy Σ σ², which then chooses its own rank.
    """
    _check_rank("truncate", rank)
    layers, errors = {}, {}
    for name, (a, b, s) in _factors(method, part, sites).items():
        layers[name], errors[name] = _best(s * a, b, rank)
    return Made(*_lora(layers, [(method, part)], sites, adapter), errors)


def convert(method: Method, part: Partition, sites: Sites, rank: int | float, *, adapter: str = "default") -> Made:
    """What a method makes of the weights, as LoRA: the best ranks of fold(W) - W, dense, one site at a time.

    Args:
      rank: an int; or a share in (0, 1] of each site's energy Σ σ², which then chooses its own rank.

    Raises:
      ValueError: the method does not fold, changes the base itself, or changes what LoRA cannot: biases, a table's rows
        at the head that is tied to it.
    """
    _check_rank("convert", rank)
    adapters.refuse_whole(method, part)
    layers: dict[str, Factors] = {}
    errors: dict[str, tuple[float, float]] = {}
    for site, dw, db in adapters.changes(tree.merge(*part), method, sites):
        if db is not None and bool(abs(db).max() > 0):
            raise ValueError(f"convert: {method.name} changes the bias of {site.path!r}, which LoRA cannot")
        for head in adapters.tied(site, sites):
            for piece in parts(method):
                if piece.tied and piece.settings and any(piece.settings(n, site.kind) is not None for n in site.names):
                    raise ValueError(
                        f"convert: {piece.name} changes {site.path!r} and the head {head.path!r} that is tied to it, "
                        "which LoRA at the table cannot; fold it instead"
                    )
        for name, layer in zip(site.names, np.asarray(dw, np.float32), strict=True):
            if any(p.settings(name, site.kind) is not None for p in parts(method) if p.settings):
                eye = np.eye(layer.shape[1], dtype=np.float32)
                layers[name], errors[name] = _best(layer, eye, rank, dense=True)
    return Made(*_lora(layers, [(method, part)], sites, adapter), errors)


# --- factors --------------------------------------------------------------------------------------


def _factors(method: Method, part: Partition, sites: Sites) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """{module name: (a, b, scale)} of a LoRA adapter."""
    if method.name != "lora":
        raise ValueError(f"adapter of method {method.name!r}: only lora can be combined or truncated; convert it first")
    found = adapters.layers_of(("a", "b", "scale"), method, part, sites)
    return {name: (x["a"], x["b"], float(x["scale"])) for name, x in found.items()}


def _best(a: np.ndarray, b: np.ndarray, rank: int | float, *, dense: bool = False) -> tuple[Factors, tuple]:
    """The best ranks of a b as factors, and (‖what is left out‖, ‖a b‖). dense: a is the matrix itself, b one."""
    if dense:
        u, sizes, v = np.linalg.svd(a, full_matrices=False)
    else:
        (qa, ra), (qb, rb) = np.linalg.qr(a), np.linalg.qr(b.T)
        u, sizes, v = np.linalg.svd(ra @ rb.T)
        u, v = qa @ u[:, : len(sizes)], v[: len(sizes)] @ qb.T
    energy = np.cumsum(np.square(sizes, dtype=np.float64))
    if isinstance(rank, float):
        kept = int(np.searchsorted(energy, rank * energy[-1])) + 1
    else:
        kept = rank
    kept = min(kept, len(sizes))
    left, whole = math.sqrt(max(energy[-1] - energy[kept - 1], 0.0)), math.sqrt(energy[-1])
    return (u[:, :kept], sizes[:kept, None] * v[:kept]), (left, whole)


def _clamped(a: np.ndarray, b: np.ndarray, quantile: float) -> Factors:
    sizes = np.abs(np.concatenate([a.ravel(), b.ravel()]))
    high = np.quantile(sizes, 2 * quantile - 1)  # that of the numbers themselves, were their signs a fair coin's
    return np.clip(a, -high, high), np.clip(b, -high, high)


def _merge_factors(rule, here, name: str, density, majority, drawn) -> Factors:
    ranks = {a.shape[1] for a, *_ in here}
    if len(ranks) > 1:
        raise ValueError(
            f"combine: at {name!r} the adapters have ranks {sorted(ranks)}; {rule} adds factors of one rank: use "
            "cat, svd or another kind with an svd"
        )
    sizes = [math.sqrt(abs(w * s)) for *_, s, w in here]
    signs = [1.0 if w * s >= 0 else -1.0 for *_, s, w in here]
    signed = [z * sign for z, sign in zip(sizes, signs, strict=True)]
    a = _merge(rule, [a for a, *_ in here], signed, density, majority, drawn)
    return a, _merge(rule, [b for _, b, *_ in here], sizes, density, majority, drawn)


def _merge(rule: str, tensors: Sequence[np.ndarray], weights, density, majority: str, drawn) -> np.ndarray:
    """Σ w_i t_i of pruned tensors; with ties over those numbers alone whose sign is the elected one, as their mean."""
    if rule.startswith("dare"):
        tensors = [t * (drawn.random(t.shape) < density) / density for t in tensors]
    elif rule != "linear":
        tensors = [_largest(t, density) for t in tensors]
    stack = np.stack(tensors).astype(np.float32)
    weighted = stack * np.asarray(weights, np.float32).reshape(-1, *(1,) * (stack.ndim - 1))
    if not rule.endswith("ties"):
        return weighted.sum(0)
    signs = np.sign(stack)
    votes = stack.sum(0) if majority == "total" else signs.sum(0)
    agree = signs == np.where(votes >= 0, 1.0, -1.0)
    return (weighted * agree).sum(0) / np.maximum(agree.sum(0), 1)


def _largest(tensor: np.ndarray, density: float) -> np.ndarray:
    kept = int(density * tensor.size)
    flat = np.zeros(tensor.size, tensor.dtype)
    if kept:
        best = np.argpartition(-np.abs(tensor).ravel(), kept - 1)[:kept]
        flat[best] = tensor.ravel()[best]
    return flat.reshape(tensor.shape)


# --- the adapter ----------------------------------------------------------------------------------


def _lora(
    layers: Mapping[str, Factors], sources: Sequence[tuple[Method, Partition]], sites: Sites, adapter: str
) -> tuple[Method, Partition]:
    """A LoRA adapter of scale 1 with these factors, beside what the first source stands on."""
    ranks = {name: a.shape[1] for name, (a, _) in layers.items()}
    most = max(ranks.values())
    other = {re.escape(name): r for name, r in ranks.items() if r != most}
    method = methods.make(
        "lora",
        rank=most,
        alpha=float(most),
        rank_pattern=other,
        alpha_pattern={name: float(r) for name, r in other.items()},
        adapter=adapter,
        **_targets(set(layers), [method.config for method, _ in sources], sites),
    )
    old, part = sources[0]
    made = method.init(jax.random.key(0), adapters.remove(tree.merge(*part), old), sites)
    values = {name: {"a": a, "b": b, "scale": np.float32(1)} for name, (a, b) in layers.items()}
    return method, adapters.filled(method, made, sites, values)


def _targets(names: set[str], configs: Sequence[Mapping[str, Any]], sites: Sites) -> dict[str, Any]:
    """The shortest words for exactly these modules: one adapter's own, the union of their lists, or all names."""
    kinds = {n: site.kind for site in sites.values() for n in site.names}
    ways = [{k: c.get(k) for k in ("targets", "exclude", "layers")} for c in configs]
    if all(isinstance(w["targets"], list | tuple) for w in ways):
        ways.append({"targets": sorted({t for w in ways for t in w["targets"]})})
    for way in ways:
        if not way["targets"]:
            continue
        known = Targets(modules=way["targets"], exclude=way.get("exclude"), layers=way.get("layers"))
        if {n for n, kind in kinds.items() if known.match(n, kind)} == names:
            return way
    return {"targets": sorted(names)}


def _check_rank(verb: str, rank: int | float) -> None:
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"{verb}: a rank of {rank} is a share of the energy and must lie in (0, 1]")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"{verb}: rank {rank} must be at least 1")


def report(made: Made) -> str:
    """Lines of relative errors: every module's, then that of all."""
    lines = [f"{left / whole if whole else 0.0:8.2%}  {name}" for name, (left, whole) in made.errors.items()]
    rank = made.method.config["rank"]
    return "\n".join([*lines, f"{made.error:8.2%}  of all: relative Frobenius error of rank {rank}"])
