"""OFT: inputs of a frozen kernel turn, block by block, by trained orthogonal matrices (Qiu et al., 2023).

  y  = (x R) W          R: blocks of `block_size` on the diagonal, orthogonal (but for the sum's cut); size n = in
  W' = R W              on an embedding y = W[x] R, W' = W R, n = out

  r : [pairs, blocks]   trainable f32, zeros; block k of Q has r[:, k] above its diagonal, row by row, Qᵀ = -Q
                        pairs = block_size (block_size - 1) / 2; one column where `share`

With the last power p = terms - 1 (3 for terms = 3 too; terms = 2: I + 2 Q), or without terms the Cayley transform:

  R = I + 2 Q + 2 Q² + ... + 2 Q^(p-1) + Q^p        R = (I - Q) (I + Q)⁻¹

The sum without end is the inverse of that on the right: there Q turns the other way.

Identity at init. Trainable per site: pairs in / block_size; pairs where `share`.
Learning rate: 6e-5 to 1e-4 (the authors' DreamBooth runs: 6e-5; PEFT's MetaMathQA run: 1e-4).
Source: https://arxiv.org/abs/2306.07280, its section on Cayley parametrization, `constrained`: COFT there; acting on x,
and the sum: https://arxiv.org/abs/2506.19847.
Departs: what is added to x is x (R - I), so that in few bits small turns are not lost beside I. `dropout` is PEFT's
module_dropout, which its layers of 0.21.2 build and never call. A block_size that does not divide n gives way to the
nearest that does, as in PEFT; one of 1 is refused. PEFT projects a constrained r at every forward pass, peftax after
every update. A convolution turns its patches and has no file, where PEFT turns the image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging

from peftax.core import hf, lift, tree
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Targets
from peftax.ops.product import linear, matmul

AXES = {"r": ("pairs", "blocks")}


def oft(
    *,
    block_size: int = 32,  # the nearest divisor of the inputs is taken
    blocks: int | None = None,  # how many, in place of their size; PEFT's r
    terms: int | None = 5,  # of the Cayley-Neumann sum; None: the Cayley transform itself, by a solve
    share: bool = False,  # one block for all
    constrained: bool = False,  # COFT: the blocks of Q stay short
    eps: float = 6e-5,  # how short: Frobenius norm at most eps / sqrt(blocks)
    dropout: float = 0.0,  # share of a site's blocks that are I for one step; rounded down, none where `share`
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    bias: str = "none",  # "none" | "all" | "oft_only": which of the base's biases train
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Orthogonal fine-tuning: block-diagonal rotations before every target."""
    config = dict(locals())
    if blocks is not None and blocks < 1:
        raise ValueError(f"oft: blocks {blocks} must be at least 1")
    if blocks is None and block_size < 2:
        raise ValueError(f"oft: block_size {block_size} must be at least 2")
    if terms is not None and terms < 2:
        raise ValueError(f"oft: terms {terms} must be at least 2; the first is I. None takes the exact transform")
    if eps <= 0:
        raise ValueError(f"oft: eps {eps} must be positive")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"oft: dropout {dropout} must lie in [0, 1)")
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=modules_to_save or ())

    def init(key, k: Kernel):
        n = k.w.shape[1] if k.kind == "embed" else k.w.shape[0]
        size = nearest_divisor(n, block_size) if blocks is None else n // nearest_divisor(n, blocks)
        if size == 1:
            wanted = f"block_size {block_size}" if blocks is None else f"blocks {blocks}"
            least = next(d for d in range(2, n + 1) if n % d == 0)
            raise ValueError(
                f"oft: with {wanted} each of {n} inputs is a block and nothing turns; the smallest block_size that "
                f"divides them is {least}"
            )
        return {"trainable": {"r": jnp.zeros((size * (size - 1) // 2, 1 if share else n // size))}}

    def change(theta, ctx: Ctx):
        """R - I of each block: [blocks, size, size], f32."""
        r = theta["r"]
        if constrained:  # the gradient is that of the projected r
            r = r + jax.lax.stop_gradient(project(r, eps) - r)
        q = skew(r)
        if terms is None:
            e = -2 * jnp.linalg.solve(jnp.eye(q.shape[-1])[None] + q, q)
        elif terms == 2:
            e = 2 * q
        else:
            e = q
            for _ in range(max(terms, 4) - 2):
                e = 2 * q + q @ e
        left_out = int(dropout * len(e))
        if ctx.key is None or left_out == 0 or len(e) == 1:
            return e
        out = jax.random.permutation(ctx.key, len(e)) < left_out
        return jnp.where(out[:, None, None], 0, e)

    def call(theta, x, k: Kernel, ctx: Ctx):
        e = change(theta, ctx)
        return turn(linear(x, k.w, k.b), e) if k.kind == "embed" else linear(turn(x, e), k.w, k.b)

    def fold(theta, k: Kernel) -> Kernel:
        e = change(theta, Ctx())
        return k.replace(w=turn(k.w, e) if k.kind == "embed" else turn(k.w.T, e.swapaxes(1, 2)).T)

    def wrap(optimizer, steps, sites):
        return _constrained(optimizer, f"/oft/{adapter}/r", eps)

    adapted = lift.per_kernel(
        "oft",
        init=init,
        call=call,
        fold=fold,
        wrap=wrap if constrained else None,
        axes=AXES,
        settings=lambda name, kind: {},
        targets=target,
        draws=dropout > 0,
        adapter=adapter,
        exact=("r",),  # R is made in float32
    )
    return lift.with_base(adapted, target, bias=bias, config=config)


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n nearest to `wanted`; of two the smaller."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))


def skew(r: jax.Array) -> jax.Array:
    """[pairs, blocks], the numbers above the diagonal row by row -> [blocks, size, size], Qᵀ = -Q."""
    size = (1 + math.isqrt(1 + 8 * len(r))) // 2
    i, j = jnp.arange(size)[:, None], jnp.arange(size)[None]
    place = jnp.where(i < j, i * (2 * size - i - 1) // 2 + j - i - 1, 0)
    upper = jnp.where((i < j)[None], jnp.take(r.T, place, axis=1), 0)
    return upper - upper.swapaxes(1, 2)


def turn(x: jax.Array, e: jax.Array) -> jax.Array:
    """x [..., in] times I + e, block by block; one block e serves all."""
    parts, e = x.reshape(*x.shape[:-1], -1, e.shape[-1]), e.astype(x.dtype)
    more = matmul(parts, e[0]) if len(e) == 1 else jnp.einsum("...kb,kbc->...kc", parts, e)
    return x + more.reshape(x.shape)


def project(r: jax.Array, eps: float) -> jax.Array:
    """r [..., pairs, blocks] whose blocks of Q have a Frobenius norm of at most eps / sqrt(blocks)."""
    longest = eps / math.sqrt(r.shape[-1])
    norm = jnp.sqrt(2 * jnp.sum(jnp.square(r), axis=-2, keepdims=True))
    return jnp.where(norm <= longest, r, longest / norm * r)


def _constrained(optimizer: optax.GradientTransformation, leaf: str, eps: float) -> optax.GradientTransformation:
    """`optimizer`, after whose update every leaf of this name is projected."""
    optimizer = optax.with_extra_args_support(optimizer)

    def projected(params):
        return {p: project(x, eps) if p.endswith(leaf) else x for p, x in tree.flatten(params).items()}

    def update(grads, state, params, **more):
        start = tree.unflatten(projected(params))
        updates, state = optimizer.update(grads, state, start, **more)
        flat, held = tree.flatten(updates), tree.flatten(params)
        new = projected(optax.apply_updates(start, updates))
        return tree.unflatten({p: new[p] - held[p] if p.endswith(leaf) else x for p, x in flat.items()}), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    if "oft_block_size" not in config:
        raise hf.Unsupported(
            "OFT of PEFT before 0.14 (no oft_block_size) is not supported; the nearest is that of 0.18"
        )
    neumann = config.get("use_cayley_neumann", True)
    version = tuple(int(n) for n in str(config.get("peft_version") or "0.0").split(".")[:2] if n.isdigit())
    if neumann and version < (0, 18):
        logging.warning("oft: the adapter is of PEFT before 0.18 or does not say; its Cayley-Neumann sum was another")
    return {
        **hf.read_targets(config),
        "block_size": config["oft_block_size"] or 32,
        "blocks": config.get("r") or None,
        "terms": config.get("num_cayley_neumann_terms", 5) if neumann else None,
        "share": config.get("block_share", False),
        "constrained": config.get("coft", False),
        "eps": config.get("eps", 6e-5),
        "dropout": config.get("module_dropout", 0.0),
        "bias": config.get("bias", "none"),
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **hf.write_targets(config),
        "r": config["blocks"] or 0,
        "oft_block_size": 0 if config["blocks"] else config["block_size"],
        "use_cayley_neumann": config["terms"] is not None,
        "num_cayley_neumann_terms": config["terms"] or 5,
        "block_share": config["share"],
        "coft": config["constrained"],
        "eps": config["eps"],
        "module_dropout": config["dropout"],
        "bias": config["bias"],
        "init_weights": True,
        "peft_version": "0.21.2",  # or readers take the sum to be that of before 0.18
    }


HF = hf.Format(
    peft_type="OFT",
    keys={
        "linear": {"r": "oft_R.weight"},
        "head": {"r": "oft_R.weight"},
        "embed": {"r": "oft_embedding_R.weight"},
    },
    read=_read,
    write=_write,
)
