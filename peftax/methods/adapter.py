"""Bottleneck adapters: a small network after, or beside, a frozen module (Houlsby et al., 2019).

  y = f(x) + s (σ(f(x) D + d) U + u)    "houlsby": f is attention and feed-forward; "pfeiffer": feed-forward alone
  y = f(x) + s (σ(x D + d) U + u)       "parallel": beside the feed-forward; "scaled_parallel": the same with s = 4

  down      : [out, size], [in, size] in parallel   trainable f32, U(±1/sqrt(rows))
  up        : [size, out]                           trainable f32, zeros
  down_bias : [size]                                trainable f32, zeros
  up_bias   : [out]                                 trainable f32, zeros

Identity at init. Trainable per module: size (rows + out) + size + out.
Learning rate: 3e-5 to 3e-3 (paper, section 3.2: 3e-5 to 3e-3 swept on GLUE; T-Few: 3e-3).
Source: https://arxiv.org/abs/1902.00751, section 2.1; pfeiffer: https://arxiv.org/abs/2005.00247, section 3.2;
parallel and scaled_parallel: https://arxiv.org/abs/2110.04366, table 1, sections 4.3 and 4.5.
Departs: U starts at zero as in the parallel paper, in place of a small normal; layer norms stay frozen (chain with
a method that selects them, to train them as Houlsby does). Nonlinear, so that nothing folds.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from peftax.core import lift
from peftax.core.method import Ctx, Method
from peftax.core.sites import Block, first_output
from peftax.core.targets import Targets
from peftax.methods import inits
from peftax.ops.product import last, narrow

ACTIVATIONS = {"gelu": nn.gelu, "relu": nn.relu, "silu": nn.silu, "tanh": jnp.tanh}
FEED_FORWARD = r"(.*\.)?(mlp|layer\.\d+\.output\.dense)"  # the second: BERT's, which has no module of its own
PLACES = {
    "houlsby": ("self_attn", "mlp", "output.dense"),
    "pfeiffer": FEED_FORWARD,
    "parallel": ("mlp",),
    "scaled_parallel": ("mlp",),
}


def adapter(
    *,
    size: int = 64,  # width of the bottleneck
    placement: str = "houlsby",  # "houlsby" | "pfeiffer" | "parallel" | "scaled_parallel"
    targets: str | Sequence[str] | None = None,  # regex or suffixes of modules; None: those of the placement
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    activation: str = "gelu",  # "gelu" | "relu" | "silu" | "tanh"
    scale: float | None = None,  # s; None: 4 for "scaled_parallel", else 1
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """A bottleneck at every target."""
    config = dict(locals())
    if size < 1:
        raise ValueError(f"adapter: size {size} must be at least 1")
    for value, known in ((placement, PLACES), (activation, ACTIVATIONS)):
        if value not in known:
            raise ValueError(f"adapter: {value!r} is none of {', '.join(known)}")
    target = Targets(modules=PLACES[placement] if targets is None else targets, exclude=exclude, kinds=("block",))
    beside = placement in ("parallel", "scaled_parallel")
    s = (4.0 if placement == "scaled_parallel" else 1.0) if scale is None else scale
    rows = "in" if beside else "out"
    axes = {"down": (rows, "size"), "up": ("size", "out"), "down_bias": ("size",), "up_bias": ("out",)}

    def init(key, block: Block):
        n_in, n_out = block.shape
        shape = jax.ShapeDtypeStruct((n_in if rows == "in" else n_out, n_out), jnp.float32)
        down, up = inits.module("kaiming").kaiming(key, shape, size, s)
        return {"trainable": {"down": down, "up": up, "down_bias": jnp.zeros(size), "up_bias": jnp.zeros(n_out)}}

    def bottleneck(theta, x):
        low = narrow(x, theta["down"])
        low = ACTIVATIONS[activation](low + last(theta["down_bias"], low))
        y = narrow(low, theta["up"])
        return s * (y + last(theta["up_bias"], y))

    def call(theta, run, args, ctx: Ctx):
        out = run(*args)
        y = first_output(out)
        y = y + bottleneck(theta, args[0] if beside else y)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    return lift.per_block(
        "adapter",
        init=init,
        call=call,
        axes=axes,
        settings=lambda name, kind: {},
        targets=target,
        adapter=adapter,
        config=config,
    )
