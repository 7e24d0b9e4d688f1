"""Sites: where in a linen model a method can act.

`find` traces the model once, abstractly, and lists every product of one kernel (a Site) and every module that
turns an array into an array (a Block).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from peftax.core import tree, views
from peftax.core.method import Method, parts
from peftax.core.views import register as register  # users extend sites by views
from peftax.ops.qtensor import QTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """What sites and blocks share.

    path:   the module, "model/layers/self_attn/q_proj"; for a tied head the module that calls `attend`.
    kind:   "linear", "embed", "head", "conv" for sites, "block" for modules.
    shape:  (width of what goes in, width of what comes out).
    stacks: path of each scanned or mapped module above -> its length; of a module that holds a stack of kernels
            (experts) its own path, last.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    stacks: Mapping[str, int]

    @property
    def stack(self) -> tuple[int, ...]:
        return tuple(self.stacks.values())

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
        """A number for each layer (and expert), the same scanned and unrolled."""
        return tuple(map(_number, self.names))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site(Place):
    """One product in the model.

    kernel:  the parameter's path, with `scanned` axes in front; seen as [in, out] through (perm, n_in, n_stack).
    bias:    the bias's path, or None.
    n_stack: how many of the permuted axes number the kernels of one module; together they are the last of `stack`.
    window:  a convolution's sizes in space, which stand before its channels.
    """

    kernel: str
    bias: str | None
    perm: tuple[int, ...]
    n_in: int
    n_stack: int = 0
    window: tuple[int, ...] = ()

    @property
    def scanned(self) -> tuple[int, ...]:
        """The stack without the module's own."""
        return self.stack[:-1] if self.n_stack else self.stack

    @property
    def ndim(self) -> int:
        """How many axes the kernel has, scanned ones included."""
        return len(self.scanned) + len(self.perm)

    def matrix(self, kernel: Any) -> Any:
        """[*scanned, ...] -> [L, in, out], L counting layers and experts (1 without a stack); packed stays packed."""
        if isinstance(kernel, QTensor):
            return views.to_matrix(kernel.with_lead(math.prod(self.scanned)), self.perm, self.n_in)
        kernel = kernel.reshape(math.prod(self.scanned), *kernel.shape[len(self.scanned) :])
        matrix = jax.vmap(lambda k: views.to_matrix(k, self.perm, self.n_in, self.n_stack))(kernel)
        return matrix.reshape(-1, *self.shape)

    def unmatrix(self, matrix: Any, shape: tuple[int, ...]) -> Any:
        if isinstance(matrix, QTensor):
            return views.to_matrix(matrix.with_lead(*self.scanned), self.perm, self.n_in)
        matrix = matrix.reshape(math.prod(self.scanned), -1, *self.shape)  # experts, or 1
        own = shape[len(self.scanned) :]
        return jax.vmap(lambda m: views.from_matrix(m, self.perm, own))(matrix).reshape(shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block(Place):
    """One module that turns arrays into an array.

    args: the shapes of the arrays that it is called with, one layer's.
    """

    args: tuple[tuple[int, ...], ...]


class Sites(dict[str, Site]):
    """{site path: Site}; `blocks` {module path: Block}; `stacks`, the scanned and mapped modules of the whole model."""

    def __init__(self, sites: Mapping[str, Site], stacks: Mapping[str, int], blocks: Mapping[str, Block]):
        super().__init__(sites)
        self.stacks, self.blocks = dict(stacks), dict(blocks)

    def names(self, path: str) -> tuple[str, ...]:
        """Hugging Face's names of any path (a module or a leaf), one for each layer."""
        own = {p: site.stack[-1] for p, site in self.items() if site.n_stack}
        return hf_names(path, {p: n for p, n in (self.stacks | own).items() if path.startswith(p + "/")})

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


def _number(name: str) -> int:
    """The numbers in a name as one: "layers.2.up" -> 2; of several, one that no other name of its kind has."""
    number = 0
    for part in name.split("."):
        if part.isdigit():
            number = (number * 1_000_003 + int(part)) % 2**31
    return number


def find(apply: Callable, params: Any, *args, **kwargs) -> Sites:
    """Every site and block of a model, from one abstract trace of apply({"params": params}, *args).

    params and args may be arrays or `jax.ShapeDtypeStruct`s, weights may be packed; nothing is computed.

    Raises ValueError where one module is scanned or mapped twice at its own path, or along another axis than the first.
    """
    depth: dict[str, int] = {}  # path -> how many axes the model's leaves miss there, as scan slices them
    calls: dict[str, tuple[views.View, str]] = {}
    arrays: dict[str, tuple[list, Any]] = {}  # module path -> what it is called with, what it returns
    callers: list[nn.Module] = []
    params = tree.unpacked(params)
    flat = tree.flatten(params)

    def watch(next_fun, call_args, call_kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        for leaf, value in tree.flatten(module.variables.get("params", {})).items():
            at = f"{path}/{leaf}".lstrip("/")
            whole, own = flat[at].shape, value.shape
            depth[path] = len(whole) - len(own)
            if depth[path] and whole[depth[path] :] != own:
                raise ValueError(
                    f"find: {at!r} is {whole} in the tree and {own} inside its scan, so that layers are numbered by "
                    'another axis than the first; scan or map with variable_axes={"params": 0}'
                )
        view = views.view_of(module, context.method_name, call_args, call_kwargs)
        if view is not None:
            calls[owner(view, module, callers)[1]] = (view, path)
        callers.append(module)
        try:
            out = next_fun(*call_args, **call_kwargs)
        finally:
            callers.pop()
        if context.method_name == "__call__":
            arrays[path] = ([a for a in call_args if isinstance(a, jax.Array)], first_output(out))
        return out

    def trace(p, a, k):
        with nn.intercept_methods(watch):
            return apply({"params": p}, *a, **k)

    jax.eval_shape(trace, params, args, kwargs)

    stacks: dict[str, int] = {}
    for path in sorted(depth):
        above = [p for p in stacks if path.startswith(p + "/")]
        if depth[path] > len(above) + 1:
            raise ValueError(f"find: {path!r} is scanned or mapped twice; give the inner one a module of its own")
        if depth[path] > len(above):
            leaf = next(p for p in flat if p.startswith(path + "/"))
            stacks[path] = flat[leaf].shape[len(above)]

    def stacks_above(module_path: str) -> dict[str, int]:
        return {p: n for p, n in stacks.items() if (module_path + "/").startswith(p + "/")}

    sites = {}
    for path, (view, module_path) in calls.items():
        above = stacks_above(module_path)
        kernel = f"{module_path}/{view.kernel}"
        own = flat[kernel].shape[len(above) :]
        sizes = [own[p] for p in view.perm]
        experts, sizes = sizes[: view.n_stack], sizes[view.n_stack :]
        if experts and module_path in above:
            raise ValueError(f"find: {path!r} holds a stack of kernels and is itself mapped; map a module around it")
        sites[path] = Site(
            path=path,
            kind=view.kind,
            kernel=kernel,
            bias=f"{module_path}/{view.bias}" if view.bias else None,
            perm=view.perm,
            n_in=view.n_in,
            shape=(math.prod(sizes[: view.n_in]), math.prod(sizes[view.n_in :])),
            stacks=above | ({module_path: math.prod(experts)} if experts else {}),
            n_stack=view.n_stack,
            window=tuple(sizes[: view.n_in - 1]) if view.kind == "conv" else (),
        )
    blocks = {
        path: Block(
            path=path,
            kind="block",
            shape=(came[0].shape[-1], went.shape[-1]),
            stacks=stacks_above(path),
            args=tuple(a.shape for a in came),
        )
        for path, (came, went) in arrays.items()
        if path and came and came[0].ndim and isinstance(went, jax.Array) and went.ndim
    }
    return Sites(sites, stacks, blocks)


def first_output(out: Any) -> Any:
    """What a module returns, or the first of what it returns."""
    return out[0] if isinstance(out, tuple) and out else out


def owner(view: views.View, module: nn.Module, callers: list[nn.Module]) -> tuple[nn.Module, str]:
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
        place, piece, axes = theta_of(path, method, sites)
        if place is None:
            trainable += math.prod(leaf.shape)
            continue
        own = leaf.shape[len(place.stack) :]
        assert piece.settings is not None  # a method with leaves at sites has targets
        wanted = [s for name in place.names if (s := piece.settings(name, place.kind)) is not None]
        trainable += sum(math.prod(real_shape(s, axes, own)) for s in wanted)
    return {"trainable": trainable, "total": sum(math.prod(x.shape) for x in base.values()) + trainable - moved}


def theta_of(path: str, method: Method, sites: Sites) -> tuple[Place | None, Method, tuple[str, ...]]:
    """The place (None: shared by all), the method and the axes of a leaf at [<place>/]<method>/<adapter>/<leaf>."""
    *place, name, adapter, leaf = path.split("/")
    same = [m for m in parts(method) if m.name == name]
    piece = next((m for m in same if m.adapter == adapter), same[0])  # another adapter's leaves lie as its own do
    axes = tuple(piece.axes.get(leaf, ()))
    where = "/".join(place)
    if not place:
        return None, piece, axes
    return (sites[where] if where in sites and piece.on != "block" else sites.blocks[where]), piece, axes
