"""Virtual tokens: places before a row's first token that all its segments see, and prompts, which fill them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from peftax.core import lift
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.sites import first_output
from peftax.ops.attention import EVERYWHERE
from peftax.ops.product import matmul

WHOLE = ("__call__", "hidden")  # calls of a model that take tokens


def before(values_BxT: jax.Array, front_N: jax.Array) -> jax.Array:
    """[B, N + T]: the same N values in front of every row."""
    front = jnp.broadcast_to(front_N[None], (values_BxT.shape[0], *front_N.shape))
    return jnp.concatenate([front.astype(values_BxT.dtype), values_BxT], axis=1)


def everywhere(length: int) -> jax.Array:
    """Segments [length] that all others see."""
    return jnp.full((length,), EVERYWHERE)


def _takes_tokens(args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Is this a call that virtual tokens stand before? `method` may be a name, a function or None, as in linen."""
    method = kwargs.get("method")
    if getattr(method, "__name__", method) not in (None, *WHOLE):
        return False
    if not args:
        raise ValueError(
            f"virtual tokens: the model is given {', '.join(map(repr, kwargs)) or 'nothing'} by name alone; give the "
            "token ids as its first argument"
        )
    return True


def after(length: int) -> Callable[..., Any]:
    """Method.around that moves the tokens' positions behind `length` virtual ones, which are not in the row."""

    def around(run, args, kwargs, ctx: Ctx):
        if not _takes_tokens(args, kwargs):
            return run(args, kwargs, ctx)
        inputs, (positions, *rest) = args[0], (*args[1:], None)[: max(1, len(args) - 1)]
        kwargs = dict(kwargs)
        positions = kwargs.pop("positions", positions)
        if positions is None:
            start = 0 if kwargs.get("cache") is None else kwargs["cache"]["index"]
            positions = jnp.broadcast_to(start + jnp.arange(inputs.shape[1])[None], inputs.shape[:2])
        return run((inputs, positions + length, *rest), kwargs, ctx)

    return around


def prompts(
    name: str,
    *,
    length: int,
    init: Callable[..., lift.Leaves],
    rows: Callable[..., jax.Array],
    axes: Mapping[str, tuple[str, ...]],
    table: str | None = None,
    draws: bool = False,
    adapter: str = "default",
    config: Mapping[str, Any] | None = None,
) -> Method:
    """Lift a function that makes the rows of virtual tokens to a method at the table of the tokens.

    Args:
      length: virtual tokens, which stand in front of every row; the outputs there are cut off.
      init: (key, Kernel of the table [vocabulary, out]) -> {"trainable": leaves, "frozen": leaves}.
      rows: (theta in float32, ctx, rows of the batch) -> [length, out], or [rows, length, out].
      table: suffix of the tokens' table, where the model has several.
      The others: as in lift.per_kernel. Rows before the tokens have no form as weights: they do not fold.
    """

    def settings(module: str, kind: str) -> dict[str, Any] | None:
        return {} if kind == "embed" and (table is None or f".{module}".endswith(f".{table}")) else None

    def call(theta, x, k: Kernel, ctx: Ctx):
        y = matmul(x, k.w)
        if not ctx.front:
            return y
        p = rows(theta, ctx, y.shape[0])
        p = jnp.broadcast_to(p, (y.shape[0], *p.shape[-2:]))
        return jax.lax.dynamic_update_slice(y, p.astype(y.dtype), (0, 0, 0))

    def around(run, args, kwargs, ctx: Ctx):
        if not _takes_tokens(args, kwargs):
            return run(args, kwargs, ctx)
        tokens, (positions, segments, *rest) = args[0], (*args[1:], None, None)[: max(2, len(args) - 1)]
        kwargs = dict(kwargs)
        positions, segments = kwargs.pop("positions", positions), kwargs.pop("segment_ids", segments)
        first = kwargs.get("cache") is None or ctx.start
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"{name}: the model is given embeddings; it needs token ids, whose rows it prepends")
        if first:
            tokens = before(tokens, jnp.zeros((length,), tokens.dtype))
            segments = None if segments is None else before(segments, everywhere(length))
        if positions is not None:
            positions = positions + length
            positions = before(positions, jnp.arange(length)) if first else positions
        given = [tokens, positions, segments, *rest]
        while given[-1] is None:
            given.pop()
        out = run(tuple(given), kwargs, dataclasses.replace(ctx, front=length if first else 0))
        if not first:
            return out
        y = first_output(out)[:, length:]
        return (y, *out[1:]) if isinstance(out, tuple) else y

    lifted = lift.per_kernel(
        name,
        init=init,
        call=call,
        fold=None,
        around=around,
        front=length,
        axes=axes,
        settings=settings,
        draws=draws,
        adapter=adapter,
        exact=tuple(axes),
        config=config,
    )

    def init_once(key, params, sites):
        tables = [s.path for s in sites.values() if settings(s.path.replace("/", "."), s.kind) is not None]
        if len(tables) > 1:
            raise ValueError(
                f"{name}: the model has several tables: {', '.join(tables)}; name the tokens' with `table`"
            )
        return lifted.init(key, params, sites)

    return dataclasses.replace(lifted, init=init_once)
