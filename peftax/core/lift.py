"""Functions of one kernel, one block or one leaf, lifted to methods over a whole tree.

Leaves lie at <place>/<method>/<adapter>/<leaf> in `params`, with the place's scanned axes in front; what all places
share lies at <method>/<adapter>/<leaf>.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftax.core import quantization, tree
from peftax.core.method import Ctx, Kernel, Method, Partition, chain
from peftax.core.sites import Place, Site, Sites
from peftax.core.targets import Targets
from peftax.ops.product import kept, linear
from peftax.ops.qtensor import dense

Leaves = dict[str, dict[str, jax.Array]]  # {"trainable": {leaf: array}, "frozen": {leaf: array}}


def per_kernel(
    name: str,
    *,
    init: Callable[..., Leaves],
    call: Callable[..., jax.Array],
    fold: Callable[..., Kernel] | None,
    axes: Mapping[str, tuple[str, ...]],
    settings: Callable[[str, str], dict[str, Any] | None],
    targets: Targets | None = None,
    shared: Callable[..., Leaves] | None = None,
    move: Callable[..., Kernel] | None = None,
    around: Callable[..., Any] | None = None,
    front: int = 0,
    tied: bool = False,
    penalty: Callable[..., jax.Array] | None = None,
    wrap: Callable[..., Any] | None = None,
    draws: bool = False,
    adapter: str = "default",
    needs: str = "product",
    exact: Sequence[str] = (),
    alike: bool = False,
    keeps: bool = False,
    pads: bool = False,
    config: Mapping[str, Any] | None = None,
) -> Method:
    """Lift functions of one kernel to a method over all sites that `settings` targets.

    Args:
      name: the method's and its leaf's name.
      init: (key, Kernel, **settings) -> {"trainable": leaves, "frozen": leaves}.
      call: (theta, x [..., in], Kernel, ctx) -> y [..., out]; theta holds the site's leaves and the shared ones.
      fold: (theta, Kernel) -> Kernel; law: call(theta, x, k) == x @ fold(theta, k).w + fold(theta, k).b.
      axes: leaf -> the names of its axes ("in", "out", "rank" ...): its shape's meaning and its sharding.
      settings: (Hugging Face module name, kind) -> init's keyword arguments there, or None: not a target.
      targets: what must match besides, and what an error of no match speaks of.
      shared: (key, [(in, out) of every targeted kernel]) -> leaves that all sites share.
      move: (theta at init, Kernel) -> the kernel that the base holds from then on.
      around, front, tied, wrap, pads: as in Method.
      penalty: theta of one site -> scalar; training adds the mean over all sites and layers to the loss.
      draws: call draws random numbers from ctx.key, which then differs from layer to layer.
      adapter: the name under which the leaves lie.
      needs: what call needs of the base: "product", "norms" or "dense".
      keeps: call says by `ops.product.kept` what remat "dots" keeps for the backward pass; else that is its output.
      exact: leaves that call gets in float32, whatever the kernel's dtype is.
      alike: layers of one stack must have the same settings, since zeros that pad a leaf would change what it means.
      config: what made this method, kept with its files.

    Returns:
      A Method. Layers of one stack whose settings differ share leaves of the largest shape, padded with zeros.
    """

    chosen = _chosen(targets, settings)

    def init_tree(key, params, sites) -> Partition:
        flat = tree.flatten(params)
        theta, shapes = _Theta(name, adapter), []
        for site, wanted in _targeted(sites.values(), chosen):
            if alike:
                _same(name, site, wanted)
            w = site.matrix(flat[site.kernel])
            b = flat[site.bias].reshape(len(site.layers), -1) if site.bias else None
            theta.add(site, _init_layers(init, key, site, Kernel(w, b, site.kind), wanted, draws))
            shapes.append(site.shape)
        if not shapes:
            raise ValueError(f"{name}: {_why_none(sites.values(), chosen, targets)}")
        if shared is not None:
            theta.add(None, shared(_shared_key(key, name), shapes))
        frozen, trainable = theta.halves()
        if move is not None:
            params = move_tree(tree.merge(params, frozen, trainable), sites)
        return Partition(tree.merge(params, frozen), trainable)

    def move_tree(params, sites):
        """The base's leaves alone, moved."""
        flat = tree.flatten(params)
        common = _take(flat, None, name, adapter)
        theta = {path: _take(flat, site, name, adapter) for path, site in sites.items()}
        moved = {
            site.kernel: _map_site(move, site, theta[path], common, flat, keep=True)[0]
            for path, site in sites.items()
            if theta[path]
        }
        return tree.unflatten({**flat, **moved})

    def fold_tree(params, sites):
        flat = tree.flatten(params)
        base = dict(flat)  # every site folds from the tables as they were
        common = _take(flat, None, name, adapter)
        folded = 0
        tables = [s.kernel for s in sites.values()]
        for site in sites.values():
            theta = _take(flat, site, name, adapter)
            if not theta:
                continue
            folded += 1
            if tables.count(site.kernel) > 1 and not tied:  # untie: the other site keeps the old table
                head = next(s for s in sites.values() if s.kernel == site.kernel and s.kind == "head")
                own, table = f"{head.path}/kernel", base[site.kernel]
                if site is head:
                    if own in base:
                        table = head.unmatrix(base[own][None], table.shape)
                    kernel, _ = _map_site(fold, head, theta, common, {**base, site.kernel: table})
                    flat[own] = head.matrix(kernel)[0]
                    continue
                flat.setdefault(own, dense(head.matrix(table))[0])
            kernel, bias = _map_site(fold, site, theta, common, base)
            flat[site.kernel] = kernel
            if bias is not None and site.bias:
                flat[site.bias] = bias
        if not folded:
            raise ValueError(f"fold: the tree holds no leaves of {name!r} ({adapter!r}) to fold")
        return tree.unflatten(flat)

    def penalty_tree(params, sites):
        assert penalty is not None
        one = penalty
        flat = tree.flatten(params)
        common, each = _take(flat, None, name, adapter), []
        for site in sites.values():
            if theta := _take(flat, site, name, adapter):
                n = len(site.layers)
                stacked = {leaf: x.reshape(n, *x.shape[len(site.stack) :]) for leaf, x in theta.items()}
                on = stacked.get("on", jnp.ones(n, bool))
                each.append((jax.vmap(lambda t: one({**common, **t}))(stacked), on))
        values, on = (jnp.concatenate(x) for x in zip(*each, strict=True))
        return jnp.sum(jnp.where(on, values, 0)) / jnp.sum(on)

    def call_site(leaves, x, k, ctx, where):
        theta, ctx = _enter(leaves, adapter, ctx, where)
        y = call(_cast(theta, k.w.dtype, exact), x, k, ctx)
        if "on" in theta:
            return kept(jnp.where(theta["on"], y, linear(x, k.w, k.b)))
        return y if keeps else kept(y)

    return Method(
        name=name,
        init=init_tree,
        call=call_site,
        fold=None if fold is None else fold_tree,
        move=None if move is None else move_tree,
        around=around,
        front=front,
        tied=tied,
        penalty=None if penalty is None else penalty_tree,
        wrap=wrap,
        axes=axes,
        settings=chosen,
        adapter=adapter,
        needs=needs,
        pads=pads,
        config=config or {},
    )


def per_block(
    name: str,
    *,
    init: Callable[..., Leaves],
    call: Callable[..., Any],
    axes: Mapping[str, tuple[str, ...]],
    settings: Callable[[str, str], dict[str, Any] | None],
    targets: Targets | None = None,
    shared: Callable[..., Leaves] | None = None,
    begin: Callable[..., Callable[[str], dict[str, jax.Array]]] | None = None,
    around: Callable[..., Any] | None = None,
    adapter: str = "default",
    config: Mapping[str, Any] | None = None,
) -> Method:
    """Lift functions around one module's call to a method over all modules that `settings` targets.

    Args:
      init: (key, Block, **settings) -> {"trainable": leaves, "frozen": leaves}.
      call: (theta, run, args, ctx) -> what the module returns, changed; run(*args) may be called once.
      shared: (key, [Block of every targeted module]) -> leaves that all modules share.
      begin: prefill -> (Hugging Face name of one layer's module -> its trainable leaves): a start made from what the
        untouched model computes, see Method.begin.
      The others: as in per_kernel. What stands around a module has no form as weights: it does not fold.
    """

    chosen = _chosen(targets, settings)

    def init_tree(key, params, sites) -> Partition:
        theta, blocks = _Theta(name, adapter), []
        for block, wanted in _targeted(sites.blocks.values(), chosen):
            if any(w is None for w in wanted):
                some = block.names[[w is not None for w in wanted].index(True)]
                raise ValueError(
                    f"{name}: {block.path!r} stands for all layers and only some ({some}) are targets; build the "
                    "model with scan=False"
                )
            theta.add(block, _init_layers(init, key, block, block, wanted, False))
            blocks.append(block)
        if not blocks:
            raise ValueError(f"{name}: {_why_none(sites.blocks.values(), chosen, targets)}")
        if shared is not None:
            theta.add(None, shared(_shared_key(key, name), blocks))
        frozen, trainable = theta.halves()
        return Partition(tree.merge(params, frozen), trainable)

    def begin_tree(part, prefill, sites) -> Partition:
        assert begin is not None
        of_layer, flat = begin(prefill), tree.flatten(part.trainable)
        for block, _ in _targeted(sites.blocks.values(), chosen):
            layers = [of_layer(n) for n in block.names]
            for leaf in layers[0]:
                path = f"{block.path}/{name}/{adapter}/{leaf}"
                flat[path] = jnp.stack([x[leaf] for x in layers]).reshape(flat[path].shape).astype(jnp.float32)
        return part._replace(trainable=tree.unflatten(flat))

    def call_block(leaves, run, args, ctx, where):
        theta, ctx = _enter(leaves, adapter, ctx, where)
        floating = [a.dtype for a in args if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jnp.floating)]
        if not floating:
            raise ValueError(
                f"{name}: {where!r} is given no array of floating numbers, so that nothing says in what dtype it "
                "works; take it out of targets, or target the module around it"
            )
        return call(_cast(theta, floating[0]), run, args, ctx)

    return Method(
        name=name,
        init=init_tree,
        call=call_block,
        on="block",
        fold=None,
        begin=None if begin is None else begin_tree,
        around=around,
        axes=axes,
        settings=chosen,
        adapter=adapter,
        config=config or {},
    )


def select(
    name: str,
    chosen: Callable[[str], bool],
    *,
    config: Mapping[str, Any] | None = None,
    required: bool = True,
    modules: Sequence[str] = (),
) -> Method:
    """A method that trains leaves of the base as they are, in float32 whatever the base lies in.

    Args:
      chosen: Hugging Face name of a leaf ("model.layers.0.self_attn.q_proj.bias"; the last part is
        the tree's own) -> train it?
      required: raise when nothing is chosen.
      modules: raise when one of these is the end of no name of a module that holds a leaf, or of a tied head's alone
        whose table does not train.
    """
    trains = lambda leaf, sites: chosen(leaf)  # noqa: E731
    return _select(name, trains, config=config, required=required, modules=modules)


def _select(
    name: str,
    trains: Callable[[str, Sites], bool],
    *,
    config: Mapping[str, Any] | None = None,
    required: bool = False,
    modules: Sequence[str] = (),
) -> Method:
    """`select`, whose choice may ask what the model's sites are."""

    def init(key, params, sites) -> Partition:
        del key
        holders = {n.rpartition(".")[0] for path in tree.flatten(params) for n in sites.names(path)}
        heads = {n: s.kernel for s in sites.values() if s.kind == "head" for n in s.names if n not in holders}
        holders |= {n for site in sites.values() for n in site.names}  # whose leaves another part may have
        for m in modules:
            if not any(holder.endswith(m) for holder in holders):
                near = tree.nearest(m, holders)
                raise ValueError(f"{name}: module {m!r} is not in the model; the nearest: {near}")

        def take(path: str) -> bool:
            votes = [trains(n, sites) for n in sites.names(path)]
            if any(votes) and not all(votes):
                raise ValueError(
                    f"{name}: {path!r} holds all layers in one array and only {sum(votes)} of {len(votes)} are "
                    "chosen; build the model with scan=False"
                )
            return votes[0]

        frozen, trainable = tree.split(params, take)
        still = tree.flatten(frozen)
        for m in modules:
            reached = [holder for holder in holders if holder.endswith(m)]
            if all(heads.get(holder) in still for holder in reached):
                table = sites.names(heads[reached[0]])[0].rpartition(".")[0]
                raise ValueError(
                    f"{name}: module {m!r} is a head tied to the table {table!r} and holds nothing of its own; name "
                    "the table, which trains both, or untie the base (tie_word_embeddings false, and a head)"
                )
        packed = [path for path, x in tree.flatten(trainable).items() if tree.is_packed(x)]
        if packed:
            raise ValueError(
                f"{name}: {packed[0]!r} is packed in few bits and cannot train; leave it out of config.model.quantize"
            )
        if required and not trainable:
            leaves = sorted({p.rsplit("/", 1)[-1] for p in tree.flatten(params)})
            raise ValueError(
                f"{name}: nothing is chosen; the leaves are named {', '.join(leaves)}; the modules that hold them: "
                f"{', '.join(sorted(holders)[:8])}"
            )
        return Partition(frozen, jax.tree.map(_exact, trainable))

    plain = {"fold": lambda params, sites: dict(params), "pads": True}  # it has no rank
    return Method(name=name, init=init, chosen=trains, config=config or {}, **plain)


def with_base(
    adapted: Method,
    targets: Targets,
    *,
    bias: str = "none",
    beside: Sequence[Method] = (),
    config: Mapping[str, Any],
) -> Method:
    """`adapted`, and with it the leaves of the base that train whole: targets.whole, and biases.

    bias: "none" | "all" | "<name>_only", those of the targeted modules.
    beside: other parts, such as rows of a table.
    """
    kinds = ("none", "all", f"{adapted.name}_only")
    if bias not in kinds:
        raise ValueError(f"{adapted.name}: bias {bias!r} is none of {', '.join(map(repr, kinds))}")

    def trains(name: str, sites: Sites) -> bool:
        module, _, leaf = name.rpartition(".")
        if targets.trains_whole(module) or bias == "none" or leaf != "bias":
            return targets.trains_whole(module)
        return bias == "all" or any(targets.match(module, s.kind) for s in sites.values() if module in s.names)

    trained = _select("modules_to_save", trains, modules=targets.whole)
    return chain(adapted, *beside, trained, name=adapted.name, config=config)


def with_modules(method: Method, modules: Sequence[str]) -> Method:
    """Any method, and beside it modules of the base (ends of their names) that train whole, as far as they do not."""

    def trains(name: str, sites: Sites) -> bool:
        here = name.rpartition(".")[0].endswith(tuple(modules))
        return here and not (method.chosen and method.chosen(name, sites))

    trained = _select("modules_to_save", trains, modules=modules)
    return chain(method, trained, name=method.name, config={**method.config, "modules_to_save": tuple(modules)})


# --- one place ------------------------------------------------------------------------------------


class _Theta:
    """Leaves as they gather, place by place."""

    def __init__(self, name: str, adapter: str):
        self.under, self.found = f"{name}/{adapter}", {"frozen": {}, "trainable": {}}

    def add(self, place: Place | None, leaves: Leaves) -> None:
        at, stack = (self.under, ()) if place is None else (f"{place.path}/{self.under}", place.stack)
        for half, values in leaves.items():
            for leaf, value in values.items():
                own = value.shape if place is None else value.shape[1:]
                self.found[half][f"{at}/{leaf}"] = value.reshape(*stack, *own)

    def halves(self) -> tuple[dict, dict]:
        return tree.unflatten(self.found["frozen"]), tree.unflatten(self.found["trainable"])


def _targeted(places, settings) -> Iterator[tuple[Any, list[dict | None]]]:
    for place in places:
        wanted = [settings(n, place.kind) for n in place.names]
        if any(w is not None for w in wanted):
            yield place, wanted


def _init_layers(init, key, place: Place, what: Any, wanted: list[dict | None], draws: bool) -> Leaves:
    """Every layer's leaves in one stack; `what` is a Kernel of stacks or a Block."""
    kernels = isinstance(what, Kernel)
    keys = jnp.stack([_layer_key(key, place, layer) for layer in place.layers])
    known = next(s for s in wanted if s is not None)
    settings = [known if s is None else s for s in wanted]  # a layer that is no target holds a start, unused
    try:
        if len(settings) == 1 or any(s != known for s in settings):
            of = [jax.tree.map(lambda x, i=i: x[i], what) if kernels else what for i in range(len(settings))]
            theta = _stack_padded([init(k, w, **s) for k, w, s in zip(keys, of, settings, strict=True)])
        elif kernels:
            theta = _layer_by_layer(init, tuple(known.items()), keys, what)
        else:
            theta = jax.lax.map(lambda key: init(key, what, **known), keys)
    except ValueError as error:
        error.__notes__ = [f"at site {place.path!r}", *getattr(error, "__notes__", ())]  # before JAX's own
        raise
    more = {}
    if draws:
        more["id"] = jnp.asarray(place.layers, jnp.int32)
    if any(s is None for s in wanted):  # these layers of the stack are not touched
        more["on"] = jnp.asarray([s is not None for s in wanted])
    return {**theta, "frozen": {**theta.get("frozen", {}), **more}}


@functools.partial(jax.jit, static_argnums=(0, 1))  # sites that are alike share a program
def _layer_by_layer(init, settings: tuple[tuple[str, Any], ...], keys, kernels: Kernel) -> Leaves:
    """The leaves of all layers of a stack, one after another: a start may need much memory."""
    return jax.lax.map(lambda layer: init(*layer, **dict(settings)), (keys, kernels))


def _shared_key(key, name: str):
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def _same(name: str, place: Place, wanted: list[dict | None]) -> None:
    """Raise where layers of one stack are to have unlike settings."""
    given = [(layer, s) for layer, s in zip(place.names, wanted, strict=True) if s is not None]
    for layer, settings in given:
        if settings != given[0][1]:
            raise ValueError(
                f"{name}: {given[0][0]} has {given[0][1]} and {layer} {settings}, and both lie in one stack; build "
                "the model with scan=False"
            )


def _layer_key(key, place: Place, layer: int):
    template = zlib.crc32(place.template.encode()) & 0x7FFFFFFF
    return jax.random.fold_in(jax.random.fold_in(key, template), layer)


def _stack_padded(layers: list[Any]) -> Any:
    """Trees of unlike shapes -> one stack; missing rows are zeros."""

    def stacked(*leaves):
        shape = tuple(max(sizes) for sizes in zip(*(x.shape for x in leaves), strict=True))
        grown = [jnp.zeros(shape, x.dtype).at[tuple(slice(n) for n in x.shape)].set(x) for x in leaves]
        return jnp.stack(grown)

    if any(jax.tree.structure(layer) != jax.tree.structure(layers[0]) for layer in layers):
        raise ValueError(
            "layers of one stack hold unlike leaves (a pattern gives them settings of unlike forms); build the model "
            "with scan=False"
        )
    return jax.tree.map(stacked, *layers)


def _map_site(function, site: Site, theta, common, flat, *, keep: bool = False):
    """(kernel, bias) of function(theta, Kernel), layer by layer, in f32 and then the kernel's own dtype.

    keep: a packed kernel is packed again; else it is numbers from then on.
    """
    kernel = flat[site.kernel]
    n = len(site.layers)
    theta = {leaf: x.reshape(n, *x.shape[len(site.stack) :]) for leaf, x in theta.items()}
    b = flat[site.bias] if site.bias else None
    layers = (theta, site.matrix(kernel), None if b is None else b.reshape(n, -1))
    folded = _map_layers(function, common, layers, kind=site.kind, keep=keep)
    w = site.unmatrix(folded.w, kernel.shape).astype(kernel.dtype)
    return w, None if b is None else folded.b.reshape(b.shape).astype(b.dtype)


@functools.partial(jax.jit, static_argnames=("function", "kind", "keep"))  # compiled once for all layers that are asked
def _map_layers(function, common, layers, *, kind: str, keep: bool) -> Kernel:
    def one(layer):
        theta, w, b = layer
        old = Kernel(dense(w.astype(jnp.float32)), b, kind)
        new = function({**common, **theta}, old)
        if "on" in theta:
            new = jax.tree.map(lambda new, old: jnp.where(theta["on"], new, old), new, old)
        return new.replace(w=quantization.like(new.w, w)) if keep and tree.is_packed(w) else new

    return jax.lax.map(one, layers)


def _take(flat: dict[str, Any], place: Place | None, name: str, adapter: str) -> dict[str, jax.Array]:
    """The leaves of one place (None: of all), out of `flat`."""
    at = f"{name}/{adapter}/" if place is None else f"{place.path}/{name}/{adapter}/"
    return {p.removeprefix(at): flat.pop(p) for p in list(flat) if p.startswith(at)}


def _enter(leaves: Leaves, adapter: str, ctx: Ctx, where: str) -> tuple[dict[str, jax.Array], Ctx]:
    """The leaves of one adapter, and a ctx whose key is this layer's own."""
    theta = leaves[adapter]
    if ctx.key is not None and "id" in theta:
        key = jax.random.fold_in(ctx.key, theta["id"])
        key = jax.random.fold_in(key, zlib.crc32(where.encode()) & 0x7FFFFFFF)
        ctx = dataclasses.replace(ctx, key=key)
    return theta, ctx


def _exact(leaf: jax.Array) -> jax.Array:
    """In float32: a step smaller than half of what bf16 tells apart would be lost."""
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _cast(theta, dtype, exact=()):
    short = {k for k, v in theta.items() if jnp.issubdtype(v.dtype, jnp.floating) and k not in exact}
    return {k: v.astype(dtype) if k in short else v for k, v in theta.items()}


def _chosen(targets: Targets | None, settings: Callable[[str, str], dict | None]):
    """(name, kind) -> init's keyword arguments there, or None: not a target."""
    if targets is None:
        return settings
    return lambda name, kind: settings(name, kind) if targets.match(name, kind) else None


def _why_none(places: Iterable[Place], chosen, targets: Targets | None) -> str:
    """That nothing matches, and what is nearest."""
    places = list(places)
    matches = targets.match if targets is not None else lambda name, kind: chosen(name, kind) is not None
    for place in places:  # a name that would be a target if its place were of another kind
        for name in place.names:
            if kinds := [k for k in ("linear", "conv", "embed", "head") if matches(name, k)]:
                wanted = " or ".join(map(repr, kinds))
                return f"targets match no module; {name} is of kind {place.kind!r} and would have to be {wanted}"
    names = sorted({n for p in places for n in (p.template.replace("/", "."), *p.names)})
    known = sorted({*names, *(n.rpartition(".")[2] for n in names)})
    modules = () if targets is None else targets.modules or ()
    wanted = [*([modules] if isinstance(modules, str) else modules), *(targets.parameters if targets else ())]
    near = "; ".join(f"nearest to {w!r}: {tree.nearest(w, known)}" for w in wanted if w != "all-linear")
    return f"targets match no module; {near or 'the model has ' + ', '.join(names[:8])}"
