"""DoRA: the length of every kernel column trains apart from its direction, which LoRA changes (Liu et al., 2024).

  y  = (x W + s (x A) B) ⊙ g + b       g = m / ‖W + s A B‖,  the norm of each column, no gradient through it
  W' = (W + s A B) diag(g)

  a, b, scale : as in lora
  m           : [out]  trainable f32, ‖W‖
  w2          : [out]  frozen f32, ‖W‖²

Identity at init. Trainable per site: rank (in + out) + out.
Learning rate: 1e-4 to 2e-4 (the authors' LLaMA runs).
Source: https://arxiv.org/abs/2402.09353, eq. 5, and section 4.3 for the gradient.
The norm needs no dense W + s A B: ‖W‖² + 2 s Σ_r B ⊙ (Aᵀ W) + s² Σ_r B ⊙ (Aᵀ A) B, rank more rows of the product.
Departs: under dropout the kernel's own product keeps its input whole; Hugging Face PEFT scales a second product of
the dropped input, which costs a whole product more and has the same mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftax.core import hf, lift, rows
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Patterns, Targets, low_rank
from peftax.methods import inits
from peftax.ops.product import kept, last, matmul, narrow
from peftax.ops.qtensor import dense

AXES = {"a": ("in", "rank"), "b": ("rank", "out"), "m": ("out",), "w2": ("out",), "scale": ()}


def dora(
    *,
    rank: int = 8,  # r
    alpha: float = 16.0,  # numerator of the scale
    rank_stabilized: bool = False,  # scale by alpha / sqrt(rank) instead of alpha / rank
    dropout: float = 0.0,  # probability, on the input of A
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    rank_pattern: Patterns = None,  # {regex on the end of the name: rank there}, or pairs
    alpha_pattern: Patterns = None,  # the same for alpha
    bias: str = "none",  # "none" | "all" | "dora_only": which of the base's biases train
    tokens: rows.Tokens = (),  # ids whose rows of the embedding train too | {module: ids}; see trainable_tokens
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Weight-decomposed low-rank adaptation of every target."""
    config = dict(locals())
    for r in (rank, *dict(rank_pattern or {}).values()):
        if r < 1:
            raise ValueError(f"dora: rank {r} must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dora: dropout {dropout} must lie in [0, 1)")
    whole = modules_to_save or ()
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=whole, kinds=("linear", "conv"))

    def settings(name: str, kind: str) -> dict[str, Any]:
        patterns = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
        return low_rank(name, rank, alpha, rank_stabilized=rank_stabilized, **patterns)

    def init(key, k: Kernel, *, rank: int, scale: float):
        a, b = inits.module("kaiming").kaiming(key, k.w, rank, scale)
        w2 = jnp.sum(jnp.square(dense(k.w.astype(jnp.float32))), axis=0)
        return {
            "trainable": {"a": a, "b": b, "m": jnp.sqrt(w2)},
            "frozen": {"scale": jnp.float32(scale), "w2": w2},
        }

    def per_length(theta, k: Kernel):
        """1 / the length of every column of W + s A B, 0 of a column of zeros: [out] f32."""
        a, b, s, w2 = (jax.lax.stop_gradient(theta[n].astype(jnp.float32)) for n in ("a", "b", "scale", "w2"))
        turned = jax.lax.optimization_barrier(a.T.astype(k.w.dtype))  # XLA on a CPU has no bf16 product of its turn
        across = matmul(turned, k.w).astype(jnp.float32)
        norm2 = w2 + jnp.sum(b * (2 * s * across + s * s * ((a.T @ a) @ b)), axis=0)
        return kept(jnp.where(norm2 > 0, jax.lax.rsqrt(norm2), 0))

    def call(theta, x, k: Kernel, ctx: Ctx):
        low = narrow(ctx.drop(x, dropout), theta["a"])
        y = matmul(x, k.w) + narrow(low * theta["scale"], theta["b"])  # scaled while short, as lora
        y = stretch(y, theta["m"], per_length(theta, k))
        return y if k.b is None else y + last(k.b, y)

    def fold(theta, k: Kernel) -> Kernel:
        w = k.w + theta["scale"] * (theta["a"] @ theta["b"])
        return k.replace(w=w * last(theta["m"] * per_length(theta, k), w))

    adapted = lift.per_kernel(
        "dora",
        init=init,
        call=call,
        fold=fold,
        axes=AXES,
        settings=settings,
        targets=target,
        draws=dropout > 0,
        pads=True,
        adapter=adapter,
        needs="norms",
        keeps=True,
        exact=("m", "w2"),  # a gain near 1 would be rounded to it
    )
    trained = rows.beside("dora", tokens, target, adapter=adapter)
    return lift.with_base(adapted, target, bias=bias, beside=trained, config=config)


@jax.custom_vjp
def stretch(y: jax.Array, m: jax.Array, per_length: jax.Array) -> jax.Array:
    """Columns of the product y at length m instead of their own.

      z = y ⊙ m / length        dy = dz ⊙ m / length        dm = Σ dz ⊙ y / length = Σ dz ⊙ z / m

    The backward pass needs z alone, which is kept in any case; no slope goes to the lengths.

    Args:
      y: [..., out].
      m, per_length: [out] f32.

    Returns:
      z: [..., out].
    """
    return _stretch_forward(y, m, per_length)[0]


def _stretch_forward(y, m, per_length):
    z = kept((y * last(m * per_length, y)).astype(y.dtype))  # seen by remat, as a name inside `stretch` is not
    return z, (z, m, per_length)


def _stretch_backward(saved, dz):
    z, m, per_length = saved
    dm = jnp.sum(dz.astype(jnp.float32) * z.astype(jnp.float32), axis=tuple(range(z.ndim - 1)))
    dm = dm / jnp.where(m == 0, 1, m).astype(jnp.float32)
    return (dz * last(m * per_length, dz)).astype(dz.dtype), dm.astype(m.dtype), jnp.zeros_like(per_length)


stretch.defvjp(_stretch_forward, _stretch_backward)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = hf.read_lora(config, honours=("use_dora", rows.FIELD))
    return {**settings, **rows.read(config), "bias": settings["bias"].replace("lora_only", "dora_only")}


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = hf.write_lora(config)
    return {**fields, **rows.write(config), "use_dora": True, "bias": fields["bias"].replace("dora_only", "lora_only")}


_KEYS = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
HF = hf.Format(
    peft_type="LORA",
    matches=lambda config: bool(config.get("use_dora")),
    keys={"linear": {**_KEYS, "columns": rows.TENSOR}, "conv": _KEYS, "embed": {"rows": rows.TENSOR}},
    straight=("rows",),
    windows=("a", "b", "m"),
    read=_read,
    write=_write,
)
