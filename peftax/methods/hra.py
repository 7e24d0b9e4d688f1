"""HRA: inputs of a frozen kernel go through a chain of trained Householder reflections (Yuan et al., 2024).

  y  = (x Hᵀ) W         H = H_1 H_2 ... H_rank,  H_i = I - 2 û_i û_iᵀ,  û = u / ‖u‖
  W' = Hᵀ W             with gram_schmidt  H = I - 2 Σ_i q_i q_iᵀ,  q: the orthonormal basis of the u

  u : [rank, in]  trainable f32, U(±1/sqrt(rank / 2)), each row twice in a row so that the chain is I; where rank is
                  odd or with gram_schmidt U(±1/sqrt(rank)), and the start is no identity

Identity at init, but for an odd rank and gram_schmidt. Trainable per site: rank in.
Learning rate: 1e-5 to 1e-2 (the authors' runs: 1e-5 on MetaMathQA, 4e-3 and 1e-2 on GLUE).
Source: https://arxiv.org/abs/2405.17484, the chain of its method section, gram_schmidt: its limit of λ to infinity.
The chain is one product of rank `rank`: with S = Û Ûᵀ above the diagonal and 1/2 on it, H = I - Ûᵀ S⁻¹ Û.
Departs: x is reflected, where Hugging Face PEFT makes H and W H anew in each call; with gram_schmidt PEFT starts from
rows twice in a row too, and what is left of the second is rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftax.core import hf, lift
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Targets
from peftax.ops.product import linear

AXES = {"u": ("rank", "in")}


def hra(
    *,
    rank: int = 8,  # r, reflections in the chain; an even number starts from the identity
    gram_schmidt: bool = False,  # make the reflections' directions orthogonal; PEFT's apply_GS
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    bias: str = "none",  # "none" | "all" | "hra_only": which of the base's biases train
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Householder reflection adaptation before every target."""
    config = dict(locals())
    if rank < 1:
        raise ValueError(f"hra: rank {rank} must be at least 1")
    whole = modules_to_save or ()
    kinds = ("linear", "conv", "head")
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=whole, kinds=kinds)

    def init(key, k: Kernel):
        n_in = k.w.shape[0]
        if gram_schmidt and rank > n_in:
            raise ValueError(f"hra: rank {rank} directions cannot be orthogonal among {n_in} inputs; at most {n_in}")
        twice = 1 if gram_schmidt or rank % 2 else 2
        bound = 1 / math.sqrt(rank // twice)  # PEFT's; its size sets how far a step turns û
        u = jax.random.uniform(key, (rank // twice, n_in), minval=-bound, maxval=bound)
        return {"trainable": {"u": jnp.repeat(u, twice, axis=0)}}

    def factors(u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Two [rank, in] with Hᵀ = I - leftᵀ right."""
        if gram_schmidt:
            q = jnp.linalg.qr(u.T)[0].T  # q qᵀ is the same for every orthonormal basis
            return q, 2 * q
        u = u / jnp.linalg.norm(u, axis=1, keepdims=True)
        gram = jnp.matmul(u, u.T, precision="highest")
        s = jnp.triu(gram, 1) + 0.5 * jnp.eye(rank)
        return u, jax.scipy.linalg.solve_triangular(s, u, trans=1)

    def reflect(x, u):
        # in float32: the reflections of a chain nearly undo one another
        left, right = factors(u)
        low = jnp.einsum("...i,ri->...r", x.astype(jnp.float32), left, precision="highest")
        return x - jnp.einsum("...r,ri->...i", low, right, precision="highest").astype(x.dtype)

    def call(theta, x, k: Kernel, ctx: Ctx):
        return linear(reflect(x, theta["u"]), k.w, k.b)

    def fold(theta, k: Kernel) -> Kernel:
        left, right = factors(theta["u"])
        return k.replace(w=k.w - left.T @ (right @ k.w))

    adapted = lift.per_kernel(
        "hra",
        init=init,
        call=call,
        fold=fold,
        axes=AXES,
        settings=lambda name, kind: {},
        targets=target,
        adapter=adapter,
        exact=("u",),
    )
    return lift.with_base(adapted, target, bias=bias, config=config)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **hf.read_targets(config),
        "rank": config.get("r", 8),
        "gram_schmidt": config.get("apply_GS", False),
        "bias": config.get("bias", "none"),
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = hf.write_targets(config)
    del fields["fan_in_fan_out"]
    return {
        **fields,
        "r": config["rank"],
        "apply_GS": config["gram_schmidt"],
        "bias": config["bias"],
        "init_weights": True,
    }


HF = hf.Format(
    peft_type="HRA",
    keys=dict.fromkeys(("linear", "head", "conv"), {"u": "hra_u"}),
    patches=("u",),
    takes=lambda window: len(window) == 2 and window[0] == window[1],
    read=_read,
    write=_write,
)
