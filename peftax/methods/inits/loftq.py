"""LoftQ: the factors begin as what rounding to few bits took away (Li et al., 2023).

  Q <- bits of (W - s a b),   U S Vᵀ <- W - Q,   a <- U_r sqrt(S_r / s),  b <- sqrt(S_r / s) V_rᵀ,   from a b = 0

A run whose base is packed (config.model.quantize) reads each original kernel from its file once more and makes the
second half of the first turn: the base stays Q(W), as others have it. `alternate` makes all turns of one kernel.
`method.init` alone, which has no originals, begins as kaiming.

Source: https://arxiv.org/abs/2310.08659, algorithm 1.
Departs: LoRA's scale s is taken out, so that Q + s a b is W's nearest; Hugging Face PEFT leaves it in. One turn, as
PEFT's default: more would give a base that an adapter folder does not hold.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import tree
from peftax.core.method import Method, Partition, parts
from peftax.core.sites import Sites
from peftax.methods.inits.kaiming import kaiming
from peftax.methods.inits.pissa import pissa
from peftax.ops.qtensor import QTensor, dense

MOVES = False


def loftq(key: jax.Array, w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """(a [in, rank], b [rank, out]) where W's original is not at hand: kaiming's."""
    return kaiming(key, w, rank, scale)


def alternate(
    w: jax.Array, pack: Callable[[jax.Array], QTensor], rank: int, scale: float, turns: int = 1
) -> tuple[QTensor, jax.Array, jax.Array]:
    """(Q, a [in, rank], b [rank, out]) of w [in, out] after so many turns."""
    w = w.astype(jnp.float32)
    bits = pack(w)
    a, b = _of_rest(w, bits, rank, scale)
    for _ in range(turns - 1):
        bits = pack(w - scale * (a @ b))
        a, b = _of_rest(w, bits, rank, scale)
    return bits, a, b


def _of_rest(w: jax.Array, bits: QTensor, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    return pissa(jax.random.key(0), w - dense(bits.astype(jnp.float32)), rank, scale)


def fill(
    part: Partition,
    method: Method,
    sites: Sites,
    original: Callable[[str, int], np.ndarray],
    *,
    adapter: str = "default",
) -> Partition:
    """The partition with a and b of what its packed kernels lost.

    Args:
      original: (a kernel's path, layer) -> the kernel [in, out] before it was packed.

    A target that is not packed lost nothing and keeps its start. Raises ValueError where none is packed.
    """
    (piece,) = [m for m in parts(method) if m.name == "lora"]
    assert piece.settings is not None
    frozen, trainable = (tree.flatten(half) for half in part)
    one, filled = jax.jit(_of_rest, static_argnums=2), False
    for site in sites.values():
        wanted = [piece.settings(name, site.kind) for name in site.names]
        if site.kind != "linear" or not any(wanted):
            continue
        if not isinstance(frozen[site.kernel], QTensor):
            continue
        stack, filled = site.matrix(frozen[site.kernel]), True
        for layer, settings in enumerate(wanted):
            if settings is None:
                continue
            bits = jax.tree.map(lambda x, layer=layer: x[layer], stack)
            made = one(jnp.asarray(original(site.kernel, layer)), bits, settings["rank"], settings["scale"])
            at = np.unravel_index(layer, site.stack) if site.stack else ()
            for leaf, value in zip("ab", made, strict=True):
                path = f"{site.path}/lora/{adapter}/{leaf}"
                half = trainable if path in trainable else frozen
                half[path] = half[path].at[(*at, *(slice(n) for n in value.shape))].set(value)
    if not filled:
        raise ValueError("loftq: no target is packed in few bits; set config.model.quantize, or take another init")
    return Partition(tree.unflatten(frozen), tree.unflatten(trainable))
