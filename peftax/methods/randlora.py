"""RandLoRA: a full-rank update from random bases that all sites share, and trained diagonals (Albert et al., 2025).

  y  = x W + s x D          s = alpha / rank,  D = sum over p of  g_p u_p,  p = 0 .. rank n - 1,  n = bases
  W' = W + s D              n = ceil(min(in, out) / rank)

  u_p = b[:, p // rank, p % rank], g_p = lam[p % n, p // n] gamma[:, p % n] a[p // n]; the wider side of D is u's

  lam   : [bases, rank]         trainable f32, zeros
  gamma : [narrow, bases]       trainable f32, 1 / min(in, out); narrow = min(in, out)
  a     : [rank, 1, narrowest]  frozen f32, shared by all sites, from `seed`, of variance 1
  b     : [widest, most, rank]  frozen f32, shared by all sites, from `seed`, of variance 1
  scale : []                    frozen f32, s

Identity at init. Trainable per site: bases (rank + min(in, out)).
Learning rate: 1e-4 to 1e-3 (PEFT's MetaMathQA run: 1e-4).
Source: https://arxiv.org/abs/2502.00987, the update of its method section; `sparse`: its section on sparse bases.
Departs: as in Hugging Face PEFT one basis `a` serves all n, and the two sides count their pairs (rank, base) in unlike
orders. a and b are the numbers that PEFT draws from the same seed on a machine with bfloat16. Files hold them once, at
the root, where PEFT repeats them under every module; PEFT reads them there, and warns of the repeats that it misses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import draws, hf, lift
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Targets
from peftax.ops.product import linear, matmul

AXES = {
    "lam": ("bases", "rank"),
    "gamma": ("narrow", "bases"),
    "a": ("rank", "one", "narrowest"),
    "b": ("widest", "most", "rank"),
    "scale": (),
}


def randlora(
    *,
    rank: int = 32,  # r of one basis: the smaller, the more trains
    alpha: float = 640.0,  # numerator of the scale; PEFT advises 20 times the rank
    sparse: bool = False,  # bases of -1, 0, 1, of which a third is not 0
    very_sparse: bool = False,  # of which 1 / sqrt(narrowest) is not 0; wins over sparse
    seed: int = 0,  # of the bases; Hugging Face's projection_prng_key
    save_bases: bool = True,  # write them beside the adapter; without, a reader draws them from the seed
    dropout: float = 0.0,  # probability, on the input of the update
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    bias: str = "none",  # "none" | "all" | "randlora_only": which of the base's biases train
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Full-rank updates from shared random bases."""
    config = dict(locals())
    if rank < 1:
        raise ValueError(f"randlora: rank {rank} must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"randlora: dropout {dropout} must lie in [0, 1)")
    whole = modules_to_save or ()
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=whole, kinds=("linear",))

    def init(key, k: Kernel):
        narrow = min(k.w.shape)
        bases = math.ceil(narrow / rank)
        leaves = {
            "lam": jnp.zeros((bases, rank)),
            "gamma": jnp.full((narrow, bases), 1 / max(narrow, bases), jnp.float32),
        }
        return {"trainable": leaves, "frozen": {"scale": jnp.float32(alpha / rank)}}

    def shared(key, shapes: Sequence[tuple[int, int]]):
        n_in, n_out = (max(sizes) for sizes in zip(*shapes, strict=True))
        narrowest, widest = sorted((n_in, n_out))
        shape_a, shape_b = (rank, 1, narrowest), (widest, math.ceil(narrowest / rank), rank)
        draw = draws.Generator(seed)
        if sparse or very_sparse:
            share = 1 / (2 * (math.sqrt(narrowest) if very_sparse else 3))
            a, b = (_ternary(draw.uniform(shape), share) for shape in (shape_a, shape_b))
        else:
            a = _uniform(draw, shape_a)
            b = np.concatenate([_uniform(draw, (widest, 1, rank)) for _ in range(shape_b[1])], axis=1)
        return {"frozen": {"a": jnp.asarray(_unit(a)), "b": jnp.asarray(_unit(b))}}

    def factors(theta, n_in: int, n_out: int):
        """Two factors of the update, [in, pairs] and [pairs, out]."""
        narrow, widest = sorted((n_in, n_out))
        lam, gamma = theta["lam"].T, theta["gamma"].T  # [rank, bases], [bases, narrow]
        a, b = theta["a"][:, :, :narrow], theta["b"][:widest, : lam.shape[1]]
        scaled = (lam[:, :, None] * a * gamma[None]).reshape(-1, narrow)
        fixed = b.reshape(widest, -1)
        return (scaled.T, fixed.T) if n_in == narrow else (fixed, scaled)

    def update(x, leaves, n_out: int):
        left, right = factors(leaves, x.shape[-1], n_out)
        return matmul(matmul(x, left), right)

    def call(theta, x, k: Kernel, ctx: Ctx):
        y = linear(x, k.w, k.b)
        leaves = {leaf: theta[leaf] for leaf in ("lam", "gamma", "a", "b")}
        # made again in the backward pass, or an array of the kernel's size would be kept
        again = jax.checkpoint(update, static_argnums=2)
        return y + again(ctx.drop(x, dropout), leaves, y.shape[-1]) * theta["scale"]

    def fold(theta, k: Kernel) -> Kernel:
        left, right = factors(theta, *k.w.shape)
        return k.replace(w=k.w + theta["scale"] * (left @ right))

    adapted = lift.per_kernel(
        "randlora",
        init=init,
        call=call,
        fold=fold,
        shared=shared,
        axes=AXES,
        settings=lambda name, kind: {},
        targets=target,
        draws=dropout > 0,
        adapter=adapter,
    )
    return lift.with_base(adapted, target, bias=bias, config=config)


def _uniform(draw: draws.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """torch's kaiming_uniform_(a=sqrt(5)) in bfloat16."""
    bound = draws.kaiming_bound(shape[1] * shape[2], math.sqrt(5))
    return draw.uniform(shape, -bound, bound, dtype=jnp.bfloat16)


def _ternary(unit: np.ndarray, share: float) -> np.ndarray:
    """-1 for the lowest share of U[0, 1), 1 for the highest, else 0."""
    return (unit > 1 - share).astype(np.float32) - (unit < share).astype(np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
    """Divided by the deviation in x's own type, then float32."""
    deviation = np.std(x.astype(np.float64), ddof=1).astype(x.dtype)
    return (x.astype(np.float32) / deviation.astype(np.float32)).astype(x.dtype).astype(np.float32)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **hf.read_targets(config),
        "rank": config.get("r", 32),
        "alpha": config.get("randlora_alpha", 640),
        "sparse": config.get("sparse", False),
        "very_sparse": config.get("very_sparse", False),
        "seed": config.get("projection_prng_key", 0),
        "save_bases": config.get("save_projection", True),
        "dropout": config.get("randlora_dropout", 0.0),
        "bias": config.get("bias", "none"),
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **hf.write_targets(config, known=("layers",)),
        "r": config["rank"],
        "randlora_alpha": config["alpha"],
        "sparse": config["sparse"],
        "very_sparse": config["very_sparse"],
        "projection_prng_key": config["seed"],
        "save_projection": config["save_bases"],
        "randlora_dropout": config["dropout"],
        "bias": config["bias"],
        "init_weights": True,
    }


def _opened(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Without the repeats under modules."""
    return {k: v for k, v in tensors.items() if k in _BASES or not k.endswith((".randlora_A", ".randlora_B"))}


def _closed(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {k: v for k, v in tensors.items() if config["save_bases"] or k not in _BASES}


_BASES = ("base_model.randlora_A", "base_model.randlora_B")

HF = hf.Format(
    peft_type="RANDLORA",
    keys={"linear": {"lam": "randlora_lambda", "gamma": "randlora_gamma"}},
    shared=dict(zip(("a", "b"), _BASES, strict=True)),
    read=_read,
    write=_write,
    opened=_opened,
    closed=_closed,
)
