"""Tokens whose rows train, one by one, while the rest of a table is frozen: a method by itself, and beside others.

E'[t] = rows[j] for the tokens t = ids[j], else E[t];  at a head the same rows score their tokens

rows    : [rows, out]  trainable f32, the table's own    at an embedding, and at a head that is tied to it
columns : [in, rows]   trainable f32, the kernel's own   at a head with a kernel of its own
ids     : [rows]       frozen i32
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from peftax.core import lift
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Targets, named
from peftax.ops.product import linear, matmul
from peftax.ops.qtensor import dense

AXES = {"rows": ("rows", "out"), "columns": ("in", "rows"), "ids": ("rows",)}

# beside another method's leaves in a Hugging Face PEFT folder
FIELD, TENSOR = "trainable_token_indices", "token_adapter.trainable_tokens_delta"

# token ids of the embedding | {module: its ids}, or pairs
Tokens = Sequence[int] | Mapping[str, Sequence[int]] | Sequence[tuple[str, Sequence[int]]]


def per_token(
    name: str,
    settings: Callable[[str, str], dict[str, Any] | None],
    *,
    targets: Targets | None = None,
    adapter: str = "default",
    config: Mapping[str, Any] | None = None,
) -> Method:
    """A method that trains rows of the tables where settings(name, kind) gives {"tokens": ids}; the others as in
    `lift.per_kernel`.
    """

    def init(key, k: Kernel, *, tokens: Sequence[int]):
        n = k.w.shape[0 if k.kind == "embed" else 1]
        if len(tokens) == 0:
            raise ValueError(f"{name}: tokens is empty; give the ids of the tokens whose rows train")
        wrong = [t for t in tokens if not isinstance(t, int) or not 0 <= t < n or tokens.count(t) > 1]
        if wrong:
            raise ValueError(
                f"{name}: token {wrong[0]!r} is no row of the table, which has {n}, or stands twice; tokens that are "
                "new to the tokenizer are added by config.model.new_tokens"
            )
        ids = jnp.asarray(tokens, jnp.int32)
        if k.kind == "embed":
            own = {"rows": matmul(ids, k.w).astype(jnp.float32)}
        else:
            own = {"columns": dense(k.w).astype(jnp.float32)[:, ids]}
        return {"trainable": own, "frozen": {"ids": ids}}

    def call(theta, x, k: Kernel, ctx: Ctx):
        ids = theta["ids"]
        if k.kind == "embed":
            is_own = x[..., None] == ids.reshape((1,) * x.ndim + (-1,))
            own = jnp.take(theta["rows"], is_own.argmax(-1), axis=0)
            return jnp.where(is_own.any(-1, keepdims=True), own, matmul(x, k.w))
        own = theta["rows"].T if k.kind == "head" else theta["columns"]
        y = linear(x, k.w, k.b)
        return y.at[..., ids].set(linear(x, own, None if k.b is None else k.b[ids]))

    def fold(theta, k: Kernel) -> Kernel:
        if k.kind == "embed":
            return dataclasses.replace(k, w=k.w.at[theta["ids"]].set(theta["rows"]))
        return dataclasses.replace(k, w=k.w.at[:, theta["ids"]].set(theta["columns"]))

    return lift.per_kernel(
        name,
        init=init,
        call=call,
        fold=fold,
        axes=AXES,
        settings=settings,
        targets=targets,
        tied=True,
        adapter=adapter,
        config=config,
    )


def beside(method: str, tokens: Tokens, targets: Targets, *, adapter: str) -> tuple[Method, ...]:
    """The part of `method` that trains these tokens' rows; nothing where there are none.

    Ids alone are those of the model's one embedding. A head that is tied to it follows it.
    """
    if not tokens:
        return ()
    tables = by_table(tokens)

    def settings(name: str, kind: str) -> dict[str, Any] | None:
        given = [ids for module, ids in tables.items() if (named((module,), name) if module else kind == "embed")]
        if not given or kind not in ("embed", "linear", "head"):
            return None
        if targets.trains_whole(name):
            raise ValueError(f"{method}: {name!r} is in modules_to_save and trains whole; take it out of tokens")
        if kind == "head":
            if any(ids != given[0] for ids in tables.values()):
                raise ValueError(f"{method}: {name!r} is tied to its table; give both the same tokens")
            return None
        return {"tokens": given[0]}

    part = per_token("tokens", settings, adapter=adapter)

    def init(key, params, sites):
        found = [s.path for s in sites.values() if s.kind == "embed"]
        if "" in tables and len(found) > 1:
            raise ValueError(f"{method}: the model has several tables: {', '.join(found)}; tokens must say of which")
        return part.init(key, params, sites)

    return (dataclasses.replace(part, init=init),)


def by_table(tokens: Tokens) -> dict[str, tuple[int, ...]]:
    """{module: ids}; "" stands for the embedding."""
    if not tokens:
        return {}
    given: Any = tokens
    if not isinstance(given, Mapping):
        given = dict(given) if isinstance(given[0], tuple | list) else {"": given}
    return {module: tuple(ids) for module, ids in given.items()}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter_config.json says of tokens beside a method, as its keyword argument."""
    return {"tokens": config.get(FIELD) or ()}


def write(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse."""
    tables = {module: list(ids) for module, ids in by_table(config["tokens"]).items()}
    return {FIELD: tables.get("", tables) or None}
