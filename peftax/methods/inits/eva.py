"""EVA: A spans the principal directions of what its site is given; ranks go where they explain most (Paischer et al.,
2024).

  C = Σ (x - x̄)(x - x̄)ᵀ = U Λ Uᵀ      over the counted tokens of a few batches
  a = U_r,   b = 0                      (whiten: a = U_r diag(Λ_r)^(-1/4);  init_scale times either)
  r: of all sites' λ_i / tr C, i <= rho · rank, the largest Σ rank; alpha there times r / rank

The base stays. `calibrate` makes these from one pass over batches, `fill` lays them into a partition; a run does both
(config.calibration). `method.init` alone, which sees no data, begins as kaiming.

Source: https://arxiv.org/abs/2410.07170, section 3 and algorithm 1.
Departs: C is whole, or seen through a random sketch where sites are wide (https://arxiv.org/abs/1706.05736), not an
incremental SVD; whiten is Hugging Face PEFT's, by the roots of singular values. A site with rank 0 has no adapter.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax import processes
from peftax.core import lift, tree
from peftax.core.method import Method, Partition, parts
from peftax.core.sites import Sites
from peftax.core.targets import by_pattern
from peftax.methods.inits.kaiming import kaiming
from peftax.ops.product import linear

MOVES = False


def eva(key: jax.Array, w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """(a [in, rank], b [rank, out]) where no data is at hand: kaiming's."""
    return kaiming(key, w, rank, scale)


@dataclasses.dataclass(frozen=True)
class Found:
    """What calibration found.

    a:       Hugging Face name -> the start of A [in, its rank].
    ranks:   Hugging Face name -> the rank that it was given; rank 0 is no target.
    batches: how many were looked at.
    """

    a: Mapping[str, np.ndarray]
    ranks: Mapping[str, int]
    batches: int

    def settings(self, method: Method, *, adjust: bool = True) -> dict[str, Any]:
        """The method's keyword arguments with these ranks; adjust: alpha grows with a rank, so that the scale stays."""
        config = dict(method.config)
        ranks, alphas = {}, {}
        for name, rank in self.ranks.items():
            was = by_pattern(config["rank_pattern"], name, config["rank"])
            alpha = by_pattern(config["alpha_pattern"], name, config["alpha"])
            if rank and rank != config["rank"]:
                ranks[name] = rank
            if rank and (alpha := alpha * rank / was if adjust else alpha) != config["alpha"]:
                alphas[name] = alpha
        none = [name for name, rank in self.ranks.items() if not rank]
        exclude = config["exclude"]
        if none and isinstance(exclude, str):
            exclude = "|".join((f"(?:{exclude})", *map(re.escape, none)))
        elif none:
            exclude = (*(exclude or ()), *none)
        return {**config, "rank_pattern": ranks, "alpha_pattern": alphas, "exclude": exclude}


def calibrate(
    run: Callable[[Callable, Any, Any], jax.Array],
    inject: Callable[[Method], Callable],
    method: Method,
    params: Mapping[str, Any],
    sites: Sites,
    batches: Iterable[tuple[Any, jax.Array]],
    *,
    rho: float = 2.0,
    tau: float | None = 0.99,
    whiten: bool = False,
) -> Found:
    """The starts and ranks of a LoRA method's linear sites, from what they are given.

    Statistics leave a scanned model through the backward pass: they are the gradient of leaves that do nothing.

    Args:
      run: (apply, params, batch) -> a scalar that depends on every site; what it is does not matter.
      inject: method -> the base's injected apply.
      method: plain LoRA; its targets and ranks count.
      batches: (batch, mask [B, T] of the tokens that count), in order.
      rho: no site gets more than rho times its rank; 1 leaves all ranks as they are.
      tau: stop when the directions in use of two successive looks have this cosine; None looks at all batches.
      whiten: divide each direction by the root of its singular value.
    """
    if rho < 1:
        raise ValueError(f"eva: rho {rho} must be at least 1")
    (piece,) = [m for m in parts(method) if m.name == "lora"]
    assert piece.settings is not None
    wanted = {
        name: settings["rank"]
        for site in sites.values()
        for name in site.names
        if site.kind == "linear" and (settings := piece.settings(name, site.kind)) is not None
    }
    most = {name: round(rank * rho) for name, rank in wanted.items()}
    now: dict[str, jax.Array] = {}  # the mask of the batch that is being traced
    probe = _probe(4 * max(most.values()) + 16, lambda name, kind: {} if name in wanted else None, now)
    part = jax.jit(lambda p: probe.init(jax.random.key(0), p, sites))(params)
    sketches = {p: processes.whole(x) for p, x in tree.flatten(part.frozen).items() if p.endswith("/eva/default/omega")}
    apply = inject(probe)

    @jax.jit
    @jax.grad
    def statistics(trainable, frozen, batch, mask):
        now["mask"] = mask.astype(jnp.float32)
        return run(apply, tree.merge(frozen, trainable), batch)

    sums: dict[str, Any] = {}
    spectra: dict[str, _Spectrum] = {}
    ranks: dict[str, int] = {}
    counted, seen = 0.0, 0
    for batch, mask in batches:
        counted, seen = counted + float(mask.sum()), seen + 1
        for path, x in tree.flatten(statistics(part.trainable, part.frozen, batch, mask)).items():
            sums[path] = sums.get(path, 0) + processes.whole(x).astype(np.float64)
        before, spectra = spectra, {}
        for path, omega in sketches.items():
            at = path.removesuffix("/omega")
            site = sites[at.removesuffix("/eva/default")]
            stacks = [x.reshape(-1, *x.shape[len(site.stack) :]) for x in (omega, *(sums[f"{at}/{s}"] for s in SUMS))]
            for layer, name in enumerate(site.names):
                if name in wanted:
                    spectra[name] = _spectrum(*(x[layer] for x in stacks), counted, most[name])
        ranks = _share(wanted, spectra)
        if (
            tau is not None
            and before
            and all(
                (np.abs((before[name].u[:, :r] * spectra[name].u[:, :r]).sum(0)) >= tau).all()
                for name, r in ranks.items()
            )
        ):
            break
    if not seen:
        raise ValueError("eva: no batch to look at")
    starts = {}
    for name, rank in ranks.items():
        u, values = spectra[name].u[:, :rank], spectra[name].values[:rank]
        u = u / np.maximum(values, 1e-30)[None] ** 0.25 if whiten else u
        starts[name] = (method.config["init_scale"] * u).astype(np.float32)
    return Found(starts, ranks, seen)


def fill(part: Partition, found: Found, sites: Sites, *, adapter: str = "default") -> Partition:
    """The partition of `found.settings`' method, its A as found."""
    halves = []
    for half in part:  # A may be frozen
        flat = tree.flatten(half)
        for name, start in found.a.items():
            site, layer = sites.by_name()[name]
            path = f"{site.path}/lora/{adapter}/a"
            if path in flat and start.shape[1]:
                at = np.unravel_index(layer, site.stack) if site.stack else ()
                flat[path] = flat[path].at[(*at, slice(None), slice(start.shape[1]))].set(start)
        halves.append(tree.unflatten(flat))
    return Partition(*halves)


# --- statistics -----------------------------------------------------------------------------------

AXES = {"omega": ("in", "width"), "moment": ("in", "width"), "total": ("in",), "square": ()}
SUMS = ("moment", "total", "square")


def _probe(width: int, settings: Callable[[str, str], dict | None], now: Mapping[str, jax.Array]) -> Method:
    """Leaves whose gradients are Σ x (xᵀ Ω), Σ x and Σ |x|² over the tokens that `now["mask"]` counts."""

    def init(key, k):
        n_in = k.w.shape[0]
        omega = jnp.eye(n_in) if n_in <= width else jax.random.normal(key, (n_in, width))
        zeros = {"moment": jnp.zeros_like(omega), "total": jnp.zeros(n_in), "square": jnp.zeros(())}
        return {"trainable": zeros, "frozen": {"omega": omega}}

    def call(theta, x, k, ctx):
        if x.shape[:-1] != now["mask"].shape:
            raise ValueError(f"eva: the site is given {x.shape}, the tokens are {now['mask'].shape}; leave it out")
        x = _tap(x, *(theta[leaf] for leaf in SUMS), theta["omega"], now["mask"])
        return linear(x, k.w, k.b)

    return lift.per_kernel("eva", init=init, call=call, fold=None, axes=AXES, settings=settings, exact=("omega", *SUMS))


@jax.custom_vjp
def _tap(x, moment, total, square, omega, mask):
    """x; the slopes of moment, total and square are x's sums, whatever that of x is."""
    return x


def _tap_forward(x, moment, total, square, omega, mask):
    return x, (x, omega, mask)


def _tap_backward(saved, dx):
    x, omega, mask = saved
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1]) * mask.reshape(-1, 1)
    moment = rows.T @ (rows @ omega)
    return dx, moment, rows.sum(0), jnp.square(rows).sum(), jnp.zeros_like(omega), jnp.zeros_like(mask)


_tap.defvjp(_tap_forward, _tap_backward)


@dataclasses.dataclass(frozen=True)
class _Spectrum:
    u: np.ndarray  # [in, most] directions
    values: np.ndarray  # of the scatter matrix C, falling
    trace: float  # of C


def _spectrum(omega, moment, total, square, counted: float, most: int) -> _Spectrum:
    """The first directions of C from C Ω: exactly where Ω is the identity, else by a Nyström approximation."""
    mean = total / counted
    trace = float(square - counted * mean @ mean)
    seen = moment - counted * np.outer(mean, mean @ omega)
    if omega.shape[0] == omega.shape[1]:
        values, u = np.linalg.eigh((seen + seen.T) / 2)
        return _Spectrum(u[:, ::-1][:, :most], values[::-1][:most], trace)
    shift = 1e-7 * np.linalg.norm(seen)  # keeps the factorization away from rounding
    gram = omega.T @ (seen + shift * omega)
    lower = np.linalg.cholesky((gram + gram.T) / 2)
    u, s, _ = np.linalg.svd(np.linalg.solve(lower, (seen + shift * omega).T).T, full_matrices=False)
    return _Spectrum(u[:, :most], np.maximum(s**2 - shift, 0)[:most], trace)


def _share(wanted: Mapping[str, int], spectra: Mapping[str, _Spectrum]) -> dict[str, int]:
    """Σ wanted ranks to the directions that explain the largest share of what their site is given."""
    shares = [(value / spectra[name].trace, name) for name in wanted for value in spectra[name].values]
    shares.sort(key=lambda pair: -pair[0])
    best = collections.Counter(name for _, name in shares[: sum(wanted.values())])
    return {name: best[name] for name in wanted}
