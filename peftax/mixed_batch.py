"""One batch whose rows take different LoRA or DoRA adapters, in one program: which row takes which is data.

  y_i = (x_i W + (x_i A_k) B_k) ⊙ g_k + b          k = ctx.adapters[i];  -1: y_i = x_i W + b

  a     : [total, in]           the Aᵀ of all adapters under one another, each of its own rank
  b     : [total, out]          their B under one another, times their scales
  owner : [total] int           whose rank it is
  first : [adapters] int        where each one's ranks begin
  gain  : [adapters + 1, out]   g = m / ‖W + s A B‖ of DoRA, ones elsewhere and in the last row; only with a DoRA

Few adapters or few tokens a row: all ranks of all adapters as one product, in which a row's numbers for the ranks of
others are set to zero. Every A and B is read once. Otherwise each row's own ranks are copied, and a batched product
does no more work than with one adapter; they lie in one piece, since ranks come first in both leaves. Shapes decide
which, and nothing is padded but what is copied. An adapter that is no target somewhere takes no room there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import adapters, lift, tree
from peftax.core.method import Ctx, Kernel, Method, Partition
from peftax.core.sites import Sites
from peftax.ops.product import last, matmul
from peftax.ops.qtensor import dense

AXES = {
    "a": ("total", "in"),
    "b": ("total", "out"),
    "owner": ("total",),
    "first": ("adapters",),
    "gain": ("choices", "out"),
}
COPIED = 24  # copying a number of A or B costs as much as this many products with one (experiments/mixed_batch)


def mixed_batch(several: Sequence[tuple[Method, Partition]], sites: Sites) -> tuple[Method, Partition]:
    """Adapters of one base as one method whose rows choose among them: Ctx(adapters=[B] numbers into `several`).

    Args:
      several: (method, partition) of each, lora or dora, as `init` and `load` give them, of any ranks and targets.

    Returns:
      (method, partition): for inject(apply, method)(variables, ..., ctx=Ctx(adapters=...)). All leaves are frozen,
      dropout does not act.

    Raises:
      ValueError: an adapter is of another method, changes the base itself, biases or rows of tokens, or targets a
        stack of experts.
    """
    if not several:
        raise ValueError("mixed_batch: no adapters")
    each = []
    dora = any(method.name == "dora" for method, _ in several)
    for method, part in several:
        if method.name not in ("lora", "dora"):
            raise ValueError(
                f"mixed_batch: {method.name!r} is neither lora nor dora; make it lora by combination.convert"
            )
        each.append(adapters.layers_of(("a", "b", "scale", "m", "w2"), method, part, sites))
    ranks = {n: [x[n]["a"].shape[1] if n in x else 0 for x in each] for n in sites.by_name()}
    widest = max(max(r) for r in ranks.values())
    experts = [s.path for s in sites.values() if s.n_stack and any(any(ranks[n]) for n in s.names)]
    if experts:
        raise ValueError(f"mixed_batch: {experts[0]!r} holds a stack of experts, which are given no rows of the batch")
    mixed = _method(ranks, widest, gains=dora)
    old, part = several[0]
    base = adapters.remove(tree.merge(*part), old)
    made = mixed.init(jax.random.key(0), base, sites)
    values = {n: _joined([x.get(n) for x in each]) for n, own in ranks.items() if any(own)}
    if dora:
        flat, places = tree.flatten(base), sites.by_name()
        for n, leaves in values.items():
            site, layer = places[n]
            w = jax.tree.map(lambda x, i=layer: x[i], site.matrix(flat[site.kernel]))
            leaves["gain"] = _gains([x.get(n) for x in each], np.asarray(dense(w.astype(jnp.float32))))
    return mixed, adapters.filled(mixed, made, sites, values)


def _method(ranks: dict[str, list[int]], widest: int, *, gains: bool) -> Method:
    n = len(next(iter(ranks.values())))

    def settings(name: str, kind: str) -> dict[str, Any] | None:
        return {"total": sum(ranks[name])} if any(ranks.get(name, ())) else None

    def init(key, k: Kernel, *, total: int):
        n_in, n_out = k.w.shape
        whole = {"owner": jnp.zeros(total, jnp.int32), "first": jnp.zeros(n, jnp.int32)}
        gain = {"gain": jnp.ones((n + 1, n_out))} if gains else {}
        return {"frozen": {"a": jnp.zeros((total, n_in)), "b": jnp.zeros((total, n_out)), **whole, **gain}}

    def call(theta, x, k: Kernel, ctx: Ctx):
        which = _rows(ctx, x)
        y = matmul(x, k.w) + _update(theta, x, which, widest)
        if "gain" in theta:
            gain = theta["gain"][which]
            y = (y * gain.reshape(len(which), *(1,) * (y.ndim - 2), -1)).astype(y.dtype)
        return y if k.b is None else y + last(k.b, y)

    def shaped(theta, x, k: Kernel, ctx: Ctx):
        if jnp.issubdtype(x.dtype, jnp.integer) or x.ndim > 2:
            return call(theta, x, k, ctx)
        return call(theta, x[:, None], k, ctx)[:, 0]

    return lift.per_kernel("mixed", init=init, call=shaped, fold=None, axes=AXES, settings=settings, exact=("gain",))


def _rows(ctx: Ctx, x: jax.Array) -> jax.Array:
    if ctx.adapters is None:
        raise ValueError("mixed_batch: which adapter each row takes is not given; call with ctx=Ctx(adapters=[...])")
    which = jnp.asarray(ctx.adapters)
    if which.ndim != 1 or not jnp.issubdtype(which.dtype, jnp.integer):
        raise ValueError(f"mixed_batch: ctx.adapters is {which.dtype} {which.shape}; want int [rows of the batch]")
    if len(which) != x.shape[0]:
        raise ValueError(f"mixed_batch: ctx.adapters names {len(which)} rows and the site is given {x.shape}")
    return which


def _update(theta, x: jax.Array, which: jax.Array, widest: int) -> jax.Array:
    """(x A_k) B_k of each row's own adapter, [..., out]."""
    a, b, owner = theta["a"], theta["b"], theta["owner"]
    tokens, total = math.prod(x.shape[1:-1]), len(owner)
    widest = min(widest, total)
    if jnp.issubdtype(x.dtype, jnp.integer) or tokens * total <= (COPIED + tokens) * widest:
        low = matmul(x, a.T)
        mine = owner[None] == which[:, None]
        return matmul(low * mine.reshape(len(which), *(1,) * (low.ndim - 2), -1).astype(low.dtype), b)
    start = jnp.minimum(theta["first"][which], total - widest)  # those of -1 are the last adapter's, and masked

    def own(leaf):
        return jax.vmap(lambda at: jax.lax.dynamic_slice_in_dim(leaf, at, widest))(start)

    mine_Bx1xR = (own(owner) == which[:, None])[:, None]
    low_BxTxR = x.reshape(len(which), tokens, x.shape[-1]) @ own(a).mT * mine_Bx1xR.astype(x.dtype)
    return (low_BxTxR @ own(b)).reshape(*x.shape[:-1], b.shape[1])


def _joined(each: Sequence[dict[str, np.ndarray] | None]) -> dict[str, np.ndarray]:
    """One module's leaves of all adapters, None where it is no target, as the mixed method's."""
    here = [(i, x) for i, x in enumerate(each) if x is not None]
    ranks = [0 if x is None else x["a"].shape[1] for x in each]
    return {
        "a": np.concatenate([x["a"].T for _, x in here]),
        "b": np.concatenate([x["scale"] * x["b"] for _, x in here]),
        "owner": np.repeat(np.arange(len(each), dtype=np.int32), ranks),
        "first": (np.cumsum(ranks) - ranks).astype(np.int32),
    }


def _gains(each: Sequence[dict[str, np.ndarray] | None], w: np.ndarray) -> np.ndarray:
    gains = np.ones((len(each) + 1, w.shape[1]), np.float32)
    for i, x in enumerate(each):
        if x is not None and "m" in x:
            length = np.linalg.norm(w + x["scale"] * (x["a"] @ x["b"]), axis=0)
            gains[i] = np.divide(x["m"], length, out=np.zeros_like(length), where=length > 0)
    return gains
