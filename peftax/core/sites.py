"""Sites: where in a linen model a method acts. The only file that intercepts modules.

`find` traces the model once, abstractly, and lists every product of one kernel. `per_kernel` lifts
three array functions (init, call, fold) to a Method over all matching sites; `select` makes a Method
of plain leaves; `inject` makes `apply` see a method.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from peftax.core import tree, views
from peftax.core.method import Ctx, Kernel, Method, Partition, parts
from peftax.core.views import register as register  # users extend sites by views


@dataclasses.dataclass(frozen=True)
class Site:
    """One product in the model.

    path:   the site's module, "model/layers/self_attn/q_proj"; for a tied head the module that calls `attend`.
    kernel: the parameter's path, with `stack` scanned axes in front; seen as [in, out] through (perm, n_in).
    bias:   the bias's path, or None.
    stacks: path of each scanned module above -> its length.
    """

    path: str
    kind: str
    kernel: str
    bias: str | None
    perm: tuple[int, ...]
    n_in: int
    shape: tuple[int, int]
    stacks: Mapping[str, int]

    @property
    def stack(self) -> tuple[int, ...]:
        return tuple(self.stacks.values())

    @property
    def ndim(self) -> int:
        """How many axes the kernel has, scanned ones included."""
        return len(self.stack) + len(self.perm)

    @property
    def names(self) -> tuple[str, ...]:
        """Hugging Face's name of the module for every layer, in order."""
        return hf_names(self.path, self.stacks)

    @property
    def template(self) -> str:
        """The path without layer numbers: the same scanned and unrolled."""
        return "/".join(p for p in self.path.split("/") if not p.isdigit())

    @property
    def layers(self) -> tuple[int, ...]:
        """A number for each layer, the same scanned and unrolled."""
        if self.stack:
            return tuple(range(math.prod(self.stack)))
        digits = [int(p) for p in self.path.split("/") if p.isdigit()]
        return (digits[0] if digits else 0,)

    def matrix(self, kernel: jax.Array) -> jax.Array:
        """[*stack, ...] -> [L, in, out]; L = 1 without a stack."""
        kernel = kernel.reshape(len(self.layers), *kernel.shape[len(self.stack) :])
        return jax.vmap(lambda k: views.to_matrix(k, self.perm, self.n_in))(kernel)

    def unmatrix(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        own = shape[len(self.stack) :]
        return jax.vmap(lambda m: views.from_matrix(m, self.perm, own))(matrix).reshape(shape)


class Sites(dict[str, Site]):
    """{site path: Site}, with the scanned modules of the whole model in `stacks`."""

    def __init__(self, sites: Mapping[str, Site], stacks: Mapping[str, int]):
        super().__init__(sites)
        self.stacks = dict(stacks)

    def names(self, path: str) -> tuple[str, ...]:
        """Hugging Face's names of any path (a module or a leaf), one for each layer."""
        return hf_names(path, {p: n for p, n in self.stacks.items() if path.startswith(p + "/")})

    def by_name(self) -> dict[str, tuple[Site, int]]:
        """{Hugging Face module name: (its site, the layer's place in the stack)}."""
        return {name: (site, i) for site in self.values() for i, name in enumerate(site.names)}


def hf_names(path: str, stacks: Mapping[str, int]) -> tuple[str, ...]:
    ends = [len(p.split("/")) for p in stacks]
    names = []
    for numbers in itertools.product(*(range(n) for n in stacks.values())):
        bits = path.split("/")
        for end, number in sorted(zip(ends, numbers, strict=True), reverse=True):
            bits.insert(end, str(number))
        names.append(".".join(bits))
    return tuple(names)


def find(apply: Callable, params: Any, *args, **kwargs) -> Sites:
    """Every site of a model, from one abstract trace of apply({"params": params}, *args).

    params and args may be arrays or `jax.ShapeDtypeStruct`s; nothing is computed.
    """
    depth: dict[str, int] = {}  # path -> how many axes the model's leaves miss there, as scan slices them
    calls: dict[str, tuple[views.View, str]] = {}
    callers: list[nn.Module] = []
    flat = tree.flatten(params)

    def watch(next_fun, call_args, call_kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        for leaf, value in tree.flatten(module.variables.get("params", {})).items():
            depth[path] = flat[f"{path}/{leaf}".lstrip("/")].ndim - value.ndim
            break
        view = views.view_of(module, context.method_name, call_args, call_kwargs)
        if view is not None:
            calls[_owner(view, module, callers)[1]] = (view, path)
        callers.append(module)
        try:
            return next_fun(*call_args, **call_kwargs)
        finally:
            callers.pop()

    def trace(p, a, k):
        with nn.intercept_methods(watch):
            return apply({"params": p}, *a, **k)

    jax.eval_shape(trace, params, args, kwargs)

    stacks: dict[str, int] = {}
    for path in sorted(depth):
        above = [p for p in stacks if path.startswith(p + "/")]
        if depth[path] > len(above):
            leaf = next(p for p in flat if p.startswith(path + "/"))
            stacks[path] = flat[leaf].shape[len(above)]
    sites = {}
    for path, (view, module_path) in calls.items():
        above = {p: n for p, n in stacks.items() if (module_path + "/").startswith(p + "/")}
        kernel = f"{module_path}/{view.kernel}"
        own = flat[kernel].shape[len(above) :]
        sizes = [own[p] for p in view.perm]
        sites[path] = Site(
            path=path,
            kind=view.kind,
            kernel=kernel,
            bias=f"{module_path}/{view.bias}" if view.bias else None,
            perm=view.perm,
            n_in=view.n_in,
            shape=(math.prod(sizes[: view.n_in]), math.prod(sizes[view.n_in :])),
            stacks=above,
        )
    return Sites(sites, stacks)


def _owner(view: views.View, module: nn.Module, callers: list[nn.Module]) -> tuple[nn.Module, str]:
    """The module that holds the site's leaves, and the site's path.

    A tied head is a site of the module that calls `attend`; where that module holds the table, of the table's "attend".
    """
    path = "/".join(module.path)
    if view.kind != "head":
        return module, path
    caller = callers[-1] if callers else module
    if module.path[: len(caller.path)] == caller.path:
        return module, f"{path}/attend"
    return caller, "/".join(caller.path)


# --- methods of kernels ---------------------------------------------------------------------------


def per_kernel(
    name: str,
    *,
    init: Callable[..., dict],
    call: Callable[..., jax.Array],
    fold: Callable[..., Kernel],
    axes: Mapping[str, tuple[str, ...]],
    settings: Callable[[str, str], dict[str, Any] | None],
    adapter: str = "default",
    needs: str = "product",
    config: Mapping[str, Any] | None = None,
) -> Method:
    """Lift functions of one kernel to a method over a whole tree.

    Args:
      name: the method's and its leaf's name.
      init: (key, Kernel, **settings) -> {"trainable": leaves, "frozen": leaves}.
      call: (theta, x [..., in], Kernel, ctx) -> y [..., out].
      fold: (theta, Kernel) -> Kernel; law: call(theta, x, k) == x @ fold(theta, k).w + fold(theta, k).b.
      axes: leaf -> the names of its axes ("in", "out", "rank" ...): its shape's meaning and its sharding.
      settings: (Hugging Face module name, kind) -> init's keyword arguments there, or None: not a target.
      adapter: the name under which the leaves lie.
      needs: what call needs of the base: "product", "norms" or "dense".
      config: what made this method, kept with its files.

    Returns:
      A Method. Leaves lie at <site>/<name>/<adapter>/<leaf>, with the site's scanned axes in front. Layers of
      one stack whose settings differ share leaves of the largest shape, padded with zeros.
    """

    def place(site: Site) -> str:
        return f"{site.path}/{name}/{adapter}"

    def init_tree(key, params, sites) -> Partition:
        flat = tree.flatten(params)
        frozen, trainable = {}, {}
        for site in sites.values():
            wanted = [settings(n, site.kind) for n in site.names]
            if all(w is None for w in wanted):
                continue
            theta = _init_site(init, key, site, flat, wanted)
            for half, into in (("frozen", frozen), ("trainable", trainable)):
                for leaf, value in theta.get(half, {}).items():
                    into[f"{place(site)}/{leaf}"] = value.reshape(*site.stack, *value.shape[1:])
        if not trainable:
            raise ValueError(f"{name}: the target patterns match none of {_some_names(sites)}")
        return Partition(tree.merge(params, tree.unflatten(frozen)), tree.unflatten(trainable))

    def call_site(leaves, x, k, ctx, template):
        theta = leaves.get(adapter)
        if theta is None:
            held = ", ".join(sorted(leaves))
            raise ValueError(f"{name}: no adapter {adapter!r} at {template!r}; it holds {held}")
        if ctx.key is not None and "id" in theta:
            key = jax.random.fold_in(ctx.key, theta["id"])
            ctx = ctx.replace(key=jax.random.fold_in(key, zlib.crc32(template.encode()) & 0x7FFFFFFF))
        return call(_cast(theta, k.w.dtype), x, k, ctx)

    def fold_tree(params, sites):
        flat = tree.flatten(params)
        base = dict(flat)  # every site folds from the tables as they were
        folded = 0
        tables = [s.kernel for s in sites.values()]
        for site in sites.values():
            at = place(site) + "/"
            theta = {p.removeprefix(at): flat.pop(p) for p in list(flat) if p.startswith(at)}
            if not theta:
                continue
            folded += 1
            if tables.count(site.kernel) > 1:  # untie: the other site keeps the old table
                head = next(s for s in sites.values() if s.kernel == site.kernel and s.kind == "head")
                own, table = f"{head.path}/kernel", base[site.kernel]
                if site is head:
                    if own in base:
                        table = head.unmatrix(base[own][None], table.shape)
                    kernel, _ = _fold_site(fold, head, theta, {**base, site.kernel: table})
                    flat[own] = head.matrix(kernel)[0]
                    continue
                flat.setdefault(own, head.matrix(table)[0])
            kernel, bias = _fold_site(fold, site, theta, base)
            flat[site.kernel] = kernel
            if bias is not None and site.bias:
                flat[site.bias] = bias
        if not folded:
            raise ValueError(f"fold: the tree holds no leaves of {name!r} ({adapter!r}) to fold")
        return tree.unflatten(flat)

    return Method(
        name=name,
        init=init_tree,
        call=call_site,
        fold=fold_tree,
        axes=axes,
        settings=settings,
        needs=needs,
        config=config or {},
    )


def _init_site(init, key, site: Site, flat, wanted) -> dict[str, dict[str, jax.Array]]:
    keys = jnp.stack([_layer_key(key, site, layer) for layer in site.layers])
    w = site.matrix(flat[site.kernel])
    b = flat[site.bias].reshape(len(site.layers), -1) if site.bias else None
    if all(s == wanted[0] for s in wanted):
        theta = jax.vmap(lambda key, w, b: init(key, Kernel(w, b, site.kind), **wanted[0]))(keys, w, b)
    else:
        layers = [
            init(keys[i], Kernel(w[i], None if b is None else b[i], site.kind), **s) if s else None
            for i, s in enumerate(wanted)
        ]
        theta = _stack_padded(layers)
    ids = jnp.asarray(site.layers, jnp.int32)
    return {**theta, "frozen": {**theta.get("frozen", {}), "id": ids}}


def _layer_key(key, site: Site, layer: int):
    template = zlib.crc32(site.template.encode()) & 0x7FFFFFFF
    return jax.random.fold_in(jax.random.fold_in(key, template), layer)


def _stack_padded(layers: list[Any]) -> Any:
    """Trees of unlike shapes -> one stack; missing layers and missing rows are zeros."""
    known = [layer for layer in layers if layer is not None]
    empty = jax.tree.map(lambda x: jnp.zeros((0,) * x.ndim, x.dtype), known[0])

    def stacked(*leaves):
        shape = tuple(max(sizes) for sizes in zip(*(x.shape for x in leaves), strict=True))
        grown = [jnp.zeros(shape, x.dtype).at[tuple(slice(n) for n in x.shape)].set(x) for x in leaves]
        return jnp.stack(grown)

    return jax.tree.map(stacked, *(empty if layer is None else layer for layer in layers))


def _fold_site(fold, site: Site, theta, flat):
    kernel = flat[site.kernel]
    n = len(site.layers)
    theta = {leaf: x.reshape(n, *x.shape[len(site.stack) :]) for leaf, x in theta.items()}
    b = flat[site.bias] if site.bias else None

    def one(layer):
        theta, w, b = layer
        return fold(theta, Kernel(w.astype(jnp.float32), b, site.kind))

    folded = jax.lax.map(one, (theta, site.matrix(kernel), None if b is None else b.reshape(n, -1)))
    w = site.unmatrix(folded.w, kernel.shape).astype(kernel.dtype)
    return w, None if b is None else folded.b.reshape(b.shape).astype(b.dtype)


def _cast(theta, dtype):
    return {k: v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v for k, v in theta.items()}


def _some_names(sites: Sites, n: int = 8) -> str:
    names = sorted({".".join(s.template.split("/")) for s in sites.values()})
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


# --- methods of plain leaves ----------------------------------------------------------------------


def select(
    name: str,
    chosen: Callable[[str], bool],
    *,
    config: Mapping[str, Any] | None = None,
    required: bool = True,
    modules: Sequence[str] = (),
) -> Method:
    """A method that trains leaves of the base as they are.

    Args:
      chosen: Hugging Face name of a leaf ("model.layers.0.self_attn.q_proj.bias"; the last part is
        the tree's own) -> train it?
      required: raise when nothing is chosen.
      modules: raise when one of these suffixes is no module that holds a leaf.
    """

    def init(key, params, sites) -> Partition:
        del key
        holders = {n.rpartition(".")[0] for path in tree.flatten(params) for n in sites.names(path)}
        for m in modules:
            if not any(holder == m or holder.endswith(f".{m}") for holder in holders):
                near = tree.nearest(m, holders)
                raise ValueError(f"{name}: module {m!r} is not in the model; the nearest: {near}")

        def take(path: str) -> bool:
            votes = [chosen(n) for n in sites.names(path)]
            if any(votes) and not all(votes):
                raise ValueError(
                    f"{name}: {path!r} holds all layers in one array and only {sum(votes)} of {len(votes)} are "
                    "chosen; build the model with scan=False"
                )
            return votes[0]

        frozen, trainable = tree.split(params, take)
        if required and not trainable:
            leaves = sorted({p.rsplit("/", 1)[-1] for p in tree.flatten(params)})
            raise ValueError(f"{name}: nothing is chosen; the leaves are named {', '.join(leaves)}")
        return Partition(frozen, trainable)

    return Method(name=name, init=init, fold=lambda params, sites: dict(params), chosen=chosen, config=config or {})


# --- inject ---------------------------------------------------------------------------------------


def inject(apply: Callable, method: Method, *, rows: NamedSharding | None = None) -> Callable:
    """`apply` that sees the method's leaves.

    It takes apply's arguments, and `ctx`: a Ctx with a dropout key when training. Call it inside
    jit: an interceptor entered outside a compiled function is ignored.

    Args:
      rows: where the rows of a batch lie on a mesh. What goes into and comes out of every site is
        held there; else XLA may gather the batch where it should gather a weight.

    Raises (when called):
      ValueError: the tree holds no leaves of the method, a whole forward pass (no `method=`) left
        some untouched, or two methods meet at one site.
    """
    acting = {m.name: m for m in parts(method) if m.call is not None}

    def injected(variables, *args, ctx: Ctx | None = None, **kwargs):
        ctx = Ctx() if ctx is None else ctx
        held = _held(variables["params"], acting)
        if acting and not held:
            names = ", ".join(acting)
            raise ValueError(f"inject: the parameters hold no leaves of {names}; merge(frozen, trainable) first")
        reached: set[str] = set()
        callers: list[nn.Module] = []

        def enter(module, next_fun, call_args, call_kwargs):
            callers.append(module)
            try:
                return next_fun(*call_args, **call_kwargs)
            finally:
                callers.pop()

        def intercept(next_fun, call_args, call_kwargs, context):
            module = context.module
            view = views.view_of(module, context.method_name, call_args, call_kwargs)
            try:
                if view is None:
                    return enter(module, next_fun, call_args, call_kwargs)
                owner, path = _owner(view, module, callers)
                found = {n: leaves for n in acting if (leaves := _leaves(owner, path, n))}
                if len(found) > 1:
                    raise ValueError(f"inject: {' and '.join(found)} meet at {path!r}; one must go")
                call_args = (_hold(call_args[0], rows), *call_args[1:])
                if not found:
                    return _hold(enter(module, next_fun, call_args, call_kwargs), rows)
                ((name, leaves),) = found.items()
                reached.add(f"{path}/{name}")
                y = _product(acting[name], leaves, view, module, call_args[0], ctx, path)
                return _hold(y, rows)
            except Exception as error:
                if view is not None:
                    error.add_note(f"at site {'/'.join(module.path)!r}")
                raise

        with nn.intercept_methods(intercept):
            out = apply(variables, *args, **kwargs)
        missed = held - reached
        if missed and "method" not in kwargs:
            raise ValueError(
                f"inject: the model never reached {sorted(missed)[0]!r} ({len(missed)} of {len(held)} adapters); "
                f"the nearest that it reached: {tree.nearest(sorted(missed)[0], reached)}"
            )
        return out

    return injected


def _held(params, acting) -> set[str]:
    found = set()
    for path in tree.flatten(params):
        bits = path.split("/")
        for name in acting:
            if name in bits[:-2]:
                found.add("/".join(bits[: bits.index(name) + 1]))
    return found


def _leaves(owner: nn.Module, path: str, name: str) -> Mapping[str, Any] | None:
    held = owner.variables.get("params", {})
    for part in path.split("/")[len(owner.path) :]:  # the "attend" of a table
        held = held.get(part, {})
    leaves = held.get(name)
    return leaves if isinstance(leaves, Mapping) else None


def _hold(x: jax.Array, rows: NamedSharding | None) -> jax.Array:
    """x with its first axis split as a batch's rows, where they divide it."""
    if rows is None or x.ndim < 2 or x.shape[0] % rows.num_devices:
        return x
    spec = PartitionSpec(*rows.spec, *(None,) * (x.ndim - len(rows.spec)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(rows.mesh, spec))


def _product(part: Method, leaves, view: views.View, module, x: jax.Array, ctx, path: str):
    params = module.variables["params"]
    w = view.matrix(params[view.kernel])
    b = params[view.bias].reshape(-1) if view.bias else None
    dtype = view.dtype or (w.dtype if view.kind == "embed" else jnp.result_type(x, w))
    x = view.rows(x if view.kind == "embed" else x.astype(dtype))
    kernel = Kernel(w.astype(dtype), None if b is None else b.astype(dtype), view.kind)
    template = "/".join(p for p in path.split("/") if not p.isdigit())
    assert part.call is not None  # inject keeps only methods that act
    return view.back(part.call(leaves, x, kernel, ctx, template))


def real_shape(settings: Mapping[str, Any], axes: tuple[str, ...], padded: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one layer's leaf without its padding: an axis named as a setting has that size."""
    return tuple(int(settings.get(a, n)) for a, n in zip(axes, padded, strict=True))


def count(method: Method, params: Any, sites: Sites) -> dict[str, int]:
    """{"trainable": ..., "total": base and trainable}: real ranks, without padding, from shapes alone."""
    base = tree.flatten(tree.abstract(params))
    part = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, sites), tree.unflatten(base))
    trainable = moved = 0
    for path, leaf in tree.flatten(part.trainable).items():
        if path in base:
            moved += math.prod(leaf.shape)
            trainable += math.prod(leaf.shape)
            continue
        site, piece, axes = theta_of(path, method, sites)
        own = leaf.shape[len(site.stack) :]
        assert piece.settings is not None  # a method with leaves at sites has targets
        wanted = [s for name in site.names if (s := piece.settings(name, site.kind)) is not None]
        trainable += sum(math.prod(real_shape(s, axes, own)) for s in wanted)
    return {"trainable": trainable, "total": sum(math.prod(x.shape) for x in base.values()) + trainable - moved}


def theta_of(path: str, method: Method, sites: Sites) -> tuple[Site, Method, tuple[str, ...]]:
    """The site, the method and the axes of the leaf at <site>/<method>/<adapter>/<leaf>."""
    site, name, _, leaf = path.rsplit("/", 3)
    piece = next(m for m in parts(method) if m.name == name)
    return sites[site], piece, tuple(piece.axes.get(leaf, ()))
