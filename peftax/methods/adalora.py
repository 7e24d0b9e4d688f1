"""AdaLoRA: singular values that compete for one budget of ranks over all sites (Zhang et al., 2023).

  y  = x W + s ((x A) ⊙ e) B        s = alpha / (rank + 1e-5), rank as at the start
  W' = W + s A diag(e) B
  loss + orthogonal · mean over sites of (‖AᵀA - I‖ + ‖BBᵀ - I‖) / 2,  Frobenius norms

  a     : [in, rank]   trainable f32, N(0, 0.02²)
  e     : [one, rank]  trainable f32, zeros
  b     : [rank, out]  trainable f32, N(0, 0.02²)
  scale : []           frozen f32, s
  real  : [rank]       frozen f32, ones; zeros where a file's rank_pattern left ranks out

After step t's update, with its gradient g, every number p of A, e, B has, smoothed, a sensitivity and a doubt

  I = |p g|,   Ī <- beta1 Ī + (1 - beta1) I,   U <- beta2 U + (1 - beta2) |I - Ī|

and a rank the score (Ī U of e) + (mean over in of Ī U of A) + (mean over out of Ī U of B). Every `every` steps e is
set to zero but at the best b(t) ranks of all sites together:

  b(t) = b1 + (b0 - b1) (1 - (t - ti) / (T - ti - tf))³,   b0 = rank · sites,  b1 = target_rank · sites

for ti < t < T - tf, before that b0; at T - tf it is b1, and those ranks are the last: what was taken stays zero.

Identity at init. Trainable per site: rank (in + out + 1).
Learning rate: 1e-4 to 2e-3 (PEFT's MetaMathQA run: 1e-4; paper, appendix: 5e-4 to 2e-3).
Source: https://arxiv.org/abs/2303.10512, eq. 3, 4, 8-12 and algorithm 1.
Departs: from the paper as Hugging Face PEFT does: scale, norms without squares, no budget held above b(t) on the
way. From PEFT: steps count from 1; the sensitivity takes the gradient before clipping, since the optimizer is one
function; equal scores keep the earlier site's rank, so that the sum is the budget exactly; files leave out the ranks
whose e is zero, not those of the last mask, so that they compute what the model did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftax.core import hf, lift, rows, tree
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Targets
from peftax.ops.product import last, linear, narrow

AXES = {"a": ("in", "rank"), "e": ("one", "rank"), "b": ("rank", "out"), "scale": (), "real": ("rank",)}


def adalora(
    *,
    rank: int = 12,  # r of every site at the start
    target_rank: int = 8,  # its mean over the sites at the end
    alpha: float = 16.0,  # numerator of the scale
    first_steps: int = 0,  # ti: before the budget shrinks
    final_steps: int = 0,  # tf: with the last ranks
    every: int = 1,  # steps between two allocations
    total_steps: int | None = None,  # T; None takes the run's
    beta1: float = 0.85,  # smoothing of the sensitivity
    beta2: float = 0.85,  # smoothing of its doubt
    orthogonal: float = 0.5,  # weight of the penalty
    rank_pattern: Mapping[str, Sequence[bool]] | None = None,  # {module: which of its ranks a file holds}
    dropout: float = 0.0,  # probability, on the input of A
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    bias: str = "none",  # "none" | "all" | "adalora_only": which of the base's biases train
    tokens: rows.Tokens = (),  # ids whose rows of the embedding train too | {module: ids}; see trainable_tokens
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Adaptive budget allocation among low-rank updates."""
    config = dict(locals())
    if rank < 1 or not 0 <= target_rank <= rank:
        raise ValueError(f"adalora: want 0 <= target_rank <= rank and rank >= 1, not {target_rank} and {rank}")
    if not (0 < beta1 < 1 and 0 < beta2 < 1):
        raise ValueError(f"adalora: beta1 {beta1} and beta2 {beta2} must lie between 0 and 1")
    if orthogonal < 0:
        raise ValueError(f"adalora: orthogonal {orthogonal} must not be negative")
    if every < 1 or min(first_steps, final_steps) < 0:
        raise ValueError(f"adalora: want every >= 1 and no negative steps: {every}, {first_steps}, {final_steps}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"adalora: dropout {dropout} must lie in [0, 1)")
    whole = modules_to_save or ()
    kinds = ("linear", "conv", "head")
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=whole, kinds=kinds)
    masks = dict(rank_pattern or {})
    if wrong := [name for name, mask in masks.items() if len(mask) != rank]:
        raise ValueError(f"adalora: rank_pattern of {wrong[0]!r} has {len(masks[wrong[0]])} ranks; want rank, {rank}")

    def settings(name: str, kind: str) -> dict[str, Any]:
        return {"real": tuple(masks.get(name, [True] * rank))}

    def init(key, k: Kernel, *, real: Sequence[bool]):
        n_in, n_out = k.w.shape
        keys, real = jax.random.split(key), jnp.asarray(real, jnp.float32)
        a = 0.02 * jax.random.normal(keys[0], (n_in, rank)) * real[None]
        b = 0.02 * jax.random.normal(keys[1], (rank, n_out)) * real[:, None]
        return {
            "trainable": {"a": a, "e": jnp.zeros((1, rank)), "b": b},
            "frozen": {"scale": jnp.float32(alpha / (rank + 1e-5)), "real": real},
        }

    def call(theta, x, k: Kernel, ctx: Ctx):
        low = narrow(ctx.drop(x, dropout), theta["a"])
        return linear(x, k.w, k.b) + narrow(low * last(theta["e"] * theta["scale"], low), theta["b"])

    def fold(theta, k: Kernel) -> Kernel:
        return k.replace(w=k.w + theta["scale"] * ((theta["a"] * theta["e"]) @ theta["b"]))

    def penalty(theta):
        grams = theta["a"].T @ theta["a"], theta["b"] @ theta["b"].T
        squares = [jnp.sum(jnp.square(gram - jnp.diag(theta["real"]))) for gram in grams]
        norms = [jnp.where(s > 0, jnp.sqrt(jnp.where(s > 0, s, 1.0)), 0.0) for s in squares]  # no slope at zero
        return orthogonal * (norms[0] + norms[1]) / 2

    def wrap(optimizer, steps: int, sites):
        n_sites, real = 0, {}  # place of the leaves -> which of their ranks exist: [layers ..., rank]
        for path, site in sites.items():
            here = {name: target.match(name, site.kind) for name in site.names}
            if any(here.values()):
                each = [settings(name, site.kind)["real"] if on else [False] * rank for name, on in here.items()]
                real[f"{path}/adalora/{adapter}"] = np.asarray(each).reshape(*site.stack, rank)
                n_sites += sum(here.values())
        b0, b1 = sum(int(mask.sum()) for mask in real.values()), target_rank * n_sites
        budgets = budget(b0, b1, total_steps or steps, first_steps, final_steps)
        return _allocating(optimizer, real, budgets, every=every, last=len(budgets) - 1, beta1=beta1, beta2=beta2)

    adapted = lift.per_kernel(
        "adalora",
        init=init,
        call=call,
        fold=fold,
        penalty=penalty if orthogonal > 0 else None,
        wrap=wrap,
        axes=AXES,
        settings=settings,
        targets=target,
        draws=dropout > 0,
        adapter=adapter,
    )
    trained = rows.beside("adalora", tokens, target, adapter=adapter)
    return lift.with_base(adapted, target, bias=bias, beside=trained, config=config)


def budget(b0: int, b1: int, total: int, first: int, final: int) -> np.ndarray:
    """[total - final + 1]: how many ranks all sites together hold after step t; later ones hold the last."""
    if not first < total - final:
        raise ValueError(
            f"adalora: first_steps {first} and final_steps {final} leave none of {total} steps to shrink the budget"
        )
    t = np.arange(total - final + 1)
    left = np.where(t <= first, 1.0, 1 - (t - first) / (total - final - first))
    return np.where(t <= first, b0, (b0 - b1) * left**3 + b1).astype(np.int32)


class Allocation(NamedTuple):
    """The optimizer's state, and what is known of every rank."""

    inner: Any
    step: jax.Array  # updates so far
    smooth: dict[str, Any]  # Ī of a, e, b
    doubt: dict[str, Any]  # U of them
    keep: dict[str, Any]  # of e: the last allocation


def _allocating(
    optimizer: optax.GradientTransformation,
    real: Mapping[str, np.ndarray],
    budgets: np.ndarray,
    *,
    every: int,
    last: int,
    beta1: float,
    beta2: float,
) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, after whose update e is set to zero where the budget leaves it out."""
    optimizer = optax.with_extra_args_support(optimizer)
    first = int(np.argmax(budgets < budgets[0])) if (budgets < budgets[0]).any() else last

    def own(params) -> dict[str, jax.Array]:
        flat = tree.flatten(params)
        return {f"{place}/{leaf}": flat[f"{place}/{leaf}"] for place in real for leaf in "aeb"}

    def init(params) -> Allocation:
        keep = tree.unflatten({f"{place}/e": jnp.asarray(mask[..., None, :]) for place, mask in real.items()})
        zeros = lambda: tree.unflatten({p: jnp.zeros_like(x) for p, x in own(params).items()})  # noqa: E731
        return Allocation(optimizer.init(params), jnp.int32(0), zeros(), zeros(), keep)

    def scores(smooth, doubt) -> dict[str, jax.Array]:
        found = {}
        for place, mask in real.items():
            a, e, b = (smooth[f"{place}/{leaf}"] * doubt[f"{place}/{leaf}"] for leaf in "aeb")
            found[place] = jnp.where(mask, e[..., 0, :] + a.mean(-2) + b.mean(-1), -1.0)  # no rank: before all others
        return found

    def allocate(smooth, doubt, n: jax.Array) -> dict[str, jax.Array]:
        """The best n of all sites' ranks."""
        each = scores(smooth, doubt)
        flat = jnp.concatenate([x.reshape(-1) for x in each.values()])
        order = jnp.argsort(-flat, stable=True)
        kept = jnp.zeros(flat.shape, bool).at[order].set(jnp.arange(flat.size) < n)
        cuts = np.cumsum([x.size for x in each.values()])[:-1]
        pieces = jnp.split(kept, cuts)
        return {f"{p}/e": x.reshape(each[p].shape)[..., None, :] for p, x in zip(each, pieces, strict=True)}

    def update(grads, state: Allocation, params, **more):
        updates, inner = optimizer.update(grads, state.inner, params, **more)
        step = state.step + 1
        new, g = own(optax.apply_updates(params, updates)), own(grads)
        smooth, doubt = tree.flatten(state.smooth), tree.flatten(state.doubt)
        now = {p: jnp.abs(new[p] * g[p]) for p in new}
        moving = step < last  # from then on the ranks are the last ones
        smooth = {p: jnp.where(moving, beta1 * smooth[p] + (1 - beta1) * now[p], smooth[p]) for p in new}
        doubt = {
            p: jnp.where(moving, beta2 * doubt[p] + (1 - beta2) * jnp.abs(now[p] - smooth[p]), doubt[p]) for p in new
        }
        chosen = ((step >= first) & (step % every == 0) & moving) | (step == last)
        keep = jax.lax.cond(
            chosen,
            lambda: allocate(smooth, doubt, jnp.asarray(budgets)[jnp.minimum(step, last)]),
            lambda: tree.flatten(state.keep),
        )
        mask = chosen | (step >= last)
        flat, held = tree.flatten(updates), tree.flatten(params)
        flat |= {p: jnp.where(mask & ~keep[p], -held[p], flat[p]) for p in keep}
        back = tree.unflatten
        return back(flat), Allocation(inner, step, back(smooth), back(doubt), back(keep))

    return optax.GradientTransformationExtraArgs(init, update)


UNSUPPORTED = {
    "target_parameters": "target_parameters",
    "layer_replication": "layer_replication",
}


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    hf.refuse(config, UNSUPPORTED, "plain adalora")
    rank, alpha = config.get("init_r", 12), config.get("lora_alpha", 8)
    masks = {name.removesuffix(".lora_E"): mask for name, mask in (config.get("rank_pattern") or {}).items()}
    if alpha <= 0 and masks:
        raise hf.Unsupported(
            "ADALORA with lora_alpha 0 and a rank_pattern is not supported; the nearest is lora_alpha 1"
        )
    return {
        **hf.read_targets(config),
        **rows.read(config),
        "rank": rank,
        "target_rank": min(config.get("target_r", 8), rank),
        "alpha": alpha if alpha > 0 else rank,
        "first_steps": config.get("tinit", 0),
        "final_steps": config.get("tfinal", 0),
        "every": config.get("deltaT", 1),
        "total_steps": config.get("total_step"),
        "beta1": config.get("beta1", 0.85),
        "beta2": config.get("beta2", 0.85),
        "orthogonal": config.get("orth_reg_weight", 0.5),
        "rank_pattern": masks or None,
        "dropout": config.get("lora_dropout", 0.0),
        "bias": config.get("bias", "none").replace("lora_only", "adalora_only"),
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    masks = {f"{name}.lora_E": list(mask) for name, mask in dict(config["rank_pattern"] or {}).items()}
    shortest = config["first_steps"] + config["final_steps"] + 1  # PEFT wants a number
    return {
        **hf.write_targets(config),
        **rows.write(config),
        "init_r": config["rank"],
        "target_r": config["target_rank"],
        "lora_alpha": config["alpha"],
        "tinit": config["first_steps"],
        "tfinal": config["final_steps"],
        "deltaT": config["every"],
        "total_step": config["total_steps"] or shortest,
        "beta1": config["beta1"],
        "beta2": config["beta2"],
        "orth_reg_weight": config["orthogonal"],
        "rank_pattern": masks or None,
        "lora_dropout": config["dropout"],
        "bias": config["bias"].replace("adalora_only", "lora_only"),
        "init_lora_weights": True,
    }


def _settle(layers: hf.Layers, config: Mapping[str, Any]) -> tuple[hf.Layers, Mapping[str, Any]]:
    """Without the ranks that the budget took: their e is zero. Before any training all are."""
    masks = {name: leaves["e"][0] != 0 for name, leaves in layers.items()}
    if all(mask.all() for mask in masks.values()) or not any(mask.any() for mask in masks.values()):
        return layers, {**config, "rank_pattern": None}
    shrunk = {
        name: {"a": leaves["a"][:, masks[name]], "e": leaves["e"][:, masks[name]], "b": leaves["b"][masks[name]]}
        for name, leaves in layers.items()
    }
    return shrunk, {**config, "rank_pattern": {name: mask.tolist() for name, mask in masks.items()}}


def _opened(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a shrunk adapter at their first size, zeros where ranks were taken."""
    grown = dict(tensors)
    for name, mask in dict(config["rank_pattern"] or {}).items():
        mask = np.asarray(mask, bool)
        for leaf, axis in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            key = f"base_model.model.{name}.{leaf}"
            if key in grown and grown[key].shape[axis] == mask.sum():
                whole = np.zeros([len(mask) if i == axis else n for i, n in enumerate(grown[key].shape)], np.float32)
                whole[mask if axis == 0 else (slice(None), mask)] = grown[key]
                grown[key] = whole
    return grown


_KEYS = {"a": "lora_A", "e": "lora_E", "b": "lora_B"}
HF = hf.Format(
    peft_type="ADALORA",
    keys={"linear": {**_KEYS, "columns": rows.TENSOR}, "head": _KEYS, "conv": _KEYS, "embed": {"rows": rows.TENSOR}},
    straight=("rows",),
    patches=("a",),
    takes=lambda window: len(window) == 2,
    read=_read,
    write=_write,
    settle=_settle,
    opened=_opened,
)
