"""Making `apply` see a method: the only file that changes what a module computes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from peftax.core import tree, views
from peftax.core.method import Ctx, Kernel, Method, parts
from peftax.core.sites import owner
from peftax.ops import batch
from peftax.ops.attention import Where
from peftax.ops.product import kept, linear
from peftax.ops.qtensor import QTensor


def inject(
    apply: Callable,
    method: Method,
    *,
    rows: NamedSharding | None = None,
    specs: Mapping[str, PartitionSpec] | None = None,
) -> Callable:
    """`apply` that sees the method's leaves, and packed kernels, targeted or not.

    It takes apply's arguments, and `ctx`: a Ctx with a dropout key when training. Call it inside
    jit: an interceptor entered outside a compiled function is ignored.

    Args:
      rows: where a batch [B, T] lies on a mesh. What goes into and comes out of every site is held there; else XLA
        may gather the batch where it should gather a weight.
      specs: {path: how a packed kernel lies there}, all its axes named (`sharding.base_specs`); axes that rows are
        not split over stay split in its products.

    Adapters that the tree holds under other names do nothing: which one acts is what `method` says.

    Raises (when called):
      ValueError: the tree holds no leaves of the method's adapter, a whole forward pass (no `method=`)
        left some untouched, or two methods meet at one site (see `adapters.together`).
    """
    acting = [m for m in parts(method) if m.call is not None]

    def injected(variables, *args, ctx: Ctx | None = None, **kwargs):
        params = variables["params"]
        held = _held(params, acting)
        if acting and not held:
            names = ", ".join(f"{m.name} {m.adapter!r}" for m in acting)
            others = {p.split("/")[-2] for p in tree.flatten(params) if p.split("/")[-3:-2] == [acting[0].name]}
            hint = f"they hold {', '.join(sorted(others))}" if others else "merge(frozen, trainable) first"
            raise ValueError(f"inject: the parameters hold no leaves of {names}; {hint}")
        shared = {m.name: params[m.name] for m in acting if isinstance(params.get(m.name), Mapping)}
        reached: set[str] = set()

        def run(args, kwargs, ctx):
            with nn.intercept_methods(_interceptor(acting, shared, ctx, rows, specs or {}, method.front, reached)):
                return apply(variables, *args, **kwargs)

        for part in reversed(parts(method)):
            if part.around is not None:
                run = functools.partial(part.around, run)
        out = run(args, kwargs, Ctx() if ctx is None else ctx)
        missed = held - reached
        if missed and kwargs.get("method") is None:
            raise ValueError(
                f"inject: the model never reached {sorted(missed)[0]!r} ({len(missed)} of {len(held)} adapters); "
                f"the nearest that it reached: {tree.nearest(sorted(missed)[0], reached)}"
            )
        return out

    # into how many parts a mesh cuts the tokens of a row: a chunk of the loss takes of each
    parted = 1 if rows is None else batch.parts(rows.mesh, batch.token_axes(rows))
    injected.token_parts = parted  # pyright: ignore[reportFunctionMemberAccess]
    return injected


def _interceptor(
    acting: Sequence[Method], shared: Mapping[str, Any], ctx: Ctx, rows, specs: Mapping, front: int, reached: set[str]
):
    callers: list[nn.Module] = []
    on_kernels = [m for m in acting if m.on == "kernel"]
    on_blocks = [m for m in acting if m.on == "block"]

    def enter(module, next_fun, call_args, call_kwargs):
        callers.append(module)
        try:
            return next_fun(*call_args, **call_kwargs)
        finally:
            callers.pop()

    def at_kernel(view, module, next_fun, call_args, call_kwargs):
        holder, path = owner(view, module, callers)
        found = [(m, leaves) for m in on_kernels if (leaves := _leaves(holder, path, m))]
        if view.kind == "head":  # of the table, whose leaves may act here too
            table = "/".join(module.path)
            found += [(m, leaves) for m in on_kernels if m.tied and (leaves := _leaves(module, table, m))]
        if len(found) > 1 and any(m.share is None for m, _ in found):
            raise ValueError(f"inject: {' and '.join(m.name for m, _ in found)} meet at {path!r}; one must go")
        held = None if view.n_stack else rows  # the first axis may number experts
        if not call_args:  # all by name: the first array is x
            given = [x for x in call_kwargs.values() if isinstance(x, jax.Array)]
        else:
            given = call_args = (_hold(call_args[0], held), *call_args[1:])
        if not given:
            return enter(module, next_fun, call_args, call_kwargs)
        if not found and not isinstance(module.variables.get("params", {}).get(view.kernel), QTensor):
            return _hold(enter(module, next_fun, call_args, call_kwargs), held, whole=view.kind == "embed")
        x, kernel = _kernel(view, module, given[0], held, specs)
        reached.update(_leaf(path, m) for m, _ in found)
        leaves = {m.name: own for m, own in found}
        call = functools.partial(at_site, [m for m, _ in found], _template(path))
        y = (jax.vmap(call) if view.n_stack else call)(leaves, x, kernel)
        return _hold(view.back(y), held, whole=view.kind == "embed")

    def at_site(methods, where, leaves, x, kernel):
        if [m.share for m in methods] in ([None], [1.0]):
            return one(methods[0], where, leaves, x, kernel)
        plain = linear(x, kernel.w, kernel.b)
        return kept(sum((m.share * (one(m, where, leaves, x, kernel) - plain) for m in methods), start=plain))

    def one(method, where, leaves, x, kernel):
        return method.call(_with_shared(leaves[method.name], shared.get(method.name)), x, kernel, ctx, where)

    def around_block(method, leaves, path, run, *call_args):
        reached.add(_leaf(path, method))
        leaves = _with_shared(leaves, shared.get(method.name))
        return method.call(leaves, run, call_args, ctx, _template(path))

    def intercept(next_fun, call_args, call_kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        view = views.view_of(module, context.method_name, call_args, call_kwargs)
        plain = enter if view is None else functools.partial(at_kernel, view)

        def run(*args):
            return plain(module, next_fun, args, call_kwargs)

        call_args = tuple(_told(x, rows, front) for x in call_args)

        try:
            if context.method_name == "__call__":
                for method in on_blocks:
                    if leaves := _leaves(module, path, method):
                        run = functools.partial(around_block, method, leaves, path, run)
            return run(*call_args)
        except Exception as error:
            if view is not None:
                error.add_note(f"at site {path!r}")
            raise

    return intercept


def _held(params, acting: Sequence[Method]) -> set[str]:
    """The places that hold leaves: "<place>/<method>/<adapter>"."""
    axes = {(m.name, m.adapter): m.axes for m in acting}
    found = set()
    for path in tree.flatten(params):
        *place, name, adapter, leaf = ("", "", "", *path.split("/"))
        if leaf in axes.get((name, adapter), ()) and any(place):
            found.add("/".join((*place, name, adapter)).lstrip("/"))
    return found


def _leaf(path: str, method: Method) -> str:
    return f"{path}/{method.name}/{method.adapter}"


def _leaves(holder: nn.Module, path: str, method: Method) -> Mapping[str, Any] | None:
    """{adapter: leaves} that the place holds of this method, its own among them; None where it is no target."""
    held = holder.variables.get("params", {})
    for part in path.split("/")[len(holder.path) :]:  # the "attend" of a table
        held = held.get(part, {})
    leaves = held.get(method.name)
    return leaves if isinstance(leaves, Mapping) and method.adapter in leaves else None


def _with_shared(leaves, shared):
    return leaves if shared is None else {a: {**shared.get(a, {}), **own} for a, own in leaves.items()}


def _hold(x: jax.Array, rows: NamedSharding | None, *, whole: bool = False) -> jax.Array:
    """x with its first axes split as a batch's rows and tokens, where they divide them; of others the compiler decides.

    Tokens that they do not divide stay whole: XLA would else cut them unevenly. `whole`: so do features. What a table
    split over `tensor` gives has to be: XLA for CPU else splits the residual stream, and its numbers come out wrong.
    """
    if rows is None or not (lead := batch.lead(rows, x)) or lead[0] is None:
        return x
    held = lead[:2] if batch.token_axes(rows) else lead[:1]
    others = None if whole else PartitionSpec.UNCONSTRAINED
    spec = PartitionSpec(*held, *(others,) * (x.ndim - len(held)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(rows.mesh, spec))


def _told(x: Any, rows: NamedSharding | None, front: int) -> Any:
    """A Where that says how many virtual tokens there are, and how the batch lies; what it tells of keys is gathered
    here, once for all layers."""
    if not isinstance(x, Where) or x.front is not None:
        return x
    x = dataclasses.replace(x, front=front)
    if rows is None:
        return x
    whole = NamedSharding(rows.mesh, PartitionSpec(batch.lead(rows, x.k_positions)[0], None))
    k_positions, k_segments = jax.lax.with_sharding_constraint((x.k_positions, x.k_segments), whole)
    return dataclasses.replace(x, k_positions=k_positions, k_segments=k_segments, rows=rows)


def _kernel(view: views.View, module, x: jax.Array, rows, specs: Mapping) -> tuple[jax.Array, Kernel]:
    """The call's x as the view's rows, and the module's kernel and bias, in the dtype of their product."""
    params = module.variables["params"]
    w = view.matrix(params[view.kernel])
    b = params[view.bias].reshape(*w.shape[:-2], -1) if view.bias else None
    dtype = view.dtype or (w.dtype if view.kind == "embed" else jnp.result_type(x, w.dtype))
    x = view.rows(x if view.kind == "embed" else x.astype(dtype))
    w = w.astype(dtype)
    if isinstance(w, QTensor):
        spec = specs.get("/".join((*module.path, view.kernel)), (None, None))
        w = dataclasses.replace(w, rows=rows, split=tuple(spec)[-2:])
    return x, Kernel(w, None if b is None else b.astype(dtype), view.kind)


def _template(path: str) -> str:
    return "/".join(p for p in path.split("/") if not p.isdigit())
