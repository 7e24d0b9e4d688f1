"""How a call of a linen module is a product x @ w with a 2-D kernel: one view for each kind of module."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from peftax.ops.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class View:
    """One module call seen as y = x @ w + b.

    kind:    "linear", "embed" (x is row numbers), "head" (a tied embedding used as output) or "conv" (x is patches).
    kernel:  the parameter's name in the module; its axes, in order `perm`, are first the stack's (of experts, say),
             then the inputs, then the outputs.
    n_in:    how many of the permuted axes are inputs.
    rows:    the call's x -> [..., in];  back: [..., out] -> what the call returns.
    n_stack: how many of the permuted axes number kernels, each with rows of x and y of its own. Seen as one axis E,
             which then leads everywhere: w [E, in, out], b [E, out], rows and back [E, ..., in or out].
    """

    kind: str
    kernel: str
    bias: str | None
    perm: tuple[int, ...]
    n_in: int
    rows: Callable[[jax.Array], jax.Array]
    back: Callable[[jax.Array], jax.Array]
    dtype: Any = None
    n_stack: int = 0

    def matrix(self, kernel: jax.Array) -> jax.Array:
        return to_matrix(kernel, self.perm, self.n_in, self.n_stack)


def to_matrix(kernel: Any, perm: tuple[int, ...], n_in: int, n_stack: int = 0) -> Any:
    """[...] -> [in, out]; [E, in, out] of a stack. A packed kernel is [in, out] already, or [out, in] as a table."""
    if isinstance(kernel, QTensor):
        return kernel.T if perm == (1, 0) else kernel
    shape = tuple(kernel.shape[p] for p in perm)
    stack, own = shape[:n_stack], shape[n_stack:]
    lead = (math.prod(stack),) if stack else ()
    return kernel.transpose(perm).reshape(*lead, math.prod(own[:n_in]), math.prod(own[n_in:]))


def from_matrix(matrix: jax.Array, perm: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """[in, out] or [E, in, out] -> the kernel's own shape; the inverse of to_matrix."""
    inverse = tuple(sorted(range(len(perm)), key=perm.__getitem__))
    return matrix.reshape(tuple(shape[p] for p in perm)).transpose(inverse)


# (module, method_name, args, kwargs) -> View, or None where the call is no product of one kernel
ViewOf = Callable[[Any, str, tuple, dict], View | None]

_VIEWS: dict[type, ViewOf] = {}


def register(cls: type, view: ViewOf) -> None:
    """Let methods reach modules of class `cls`."""
    _VIEWS[cls] = view


def view_of(module: nn.Module, method_name: str, args: tuple, kwargs: dict) -> View | None:
    """The view of this call, or None when it is no product of one kernel.

    A subclass is seen as the class that it comes from where the method is that one's own.
    """
    for cls in type(module).__mro__:
        if cls in _VIEWS:
            own = getattr(type(module), method_name, None) is getattr(cls, method_name, None)
            return _VIEWS[cls](module, method_name, args, kwargs) if own else None
    return None


def _same(x: jax.Array) -> jax.Array:
    return x


def _dense(module: nn.Dense, method_name: str, args: tuple, kwargs: dict) -> View | None:
    if method_name != "__call__":
        return None
    bias = "bias" if module.use_bias else None
    return View("linear", "kernel", bias, (0, 1), 1, _same, _same, module.dtype)


def _dense_general(module: nn.DenseGeneral, method_name, args, kwargs) -> View | None:
    if method_name != "__call__" or module.batch_dims not in ((), []):
        return None
    features = (module.features,) if isinstance(module.features, int) else tuple(module.features)
    axis = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    n = len(axis)

    def rows(x):
        x = jnp.moveaxis(x, sorted(a % x.ndim for a in axis), range(x.ndim - n, x.ndim))  # linen sorts them
        return x.reshape(*x.shape[: x.ndim - n], -1)

    def back(y):
        return y.reshape(*y.shape[:-1], *features)

    bias = "bias" if module.use_bias else None
    perm = tuple(range(n + len(features)))
    return View("linear", "kernel", bias, perm, n, rows, back, module.dtype)


def _einsum(module: nn.Einsum, method_name: str, args: tuple, kwargs: dict) -> View | None:
    equation = module.einsum_str or kwargs.get("einsum_str") or (args[1] if len(args) > 1 else None)
    if method_name != "__call__" or not equation:
        return None
    x_axes, w_axes, y_axes = equation.replace(" ", "").replace("->", ",").split(",")
    stack = [c for c in y_axes if c in w_axes and c in x_axes]  # each of its kernels has rows of its own
    inputs = [c for c in w_axes if c in x_axes and c not in y_axes]
    outputs = [c for c in y_axes if c in w_axes and c not in x_axes]
    batch = [c for c in y_axes if c not in w_axes]
    taken, given = (*stack, *batch, *inputs), (*stack, *batch, *outputs)
    whole = sorted(taken) == sorted(x_axes) and sorted((*stack, *inputs, *outputs)) == sorted(w_axes)
    if "." in equation or not whole or not (inputs or outputs):
        return None  # an axis summed alone, a diagonal, a product number by number
    if module.use_bias and [c for c in y_axes if c in w_axes] != [*stack, *outputs]:
        return None  # the bias's axes lie in y's order
    sizes = dict(zip(w_axes, module.shape, strict=True))
    n = len(stack)

    def rows(x):
        x = x.transpose([x_axes.index(c) for c in taken])
        lead = (math.prod(x.shape[:n]),) if stack else ()
        return x.reshape(*lead, *x.shape[n : n + len(batch)], math.prod(x.shape[n + len(batch) :]))

    def back(y):
        y = y.reshape(*(sizes[c] for c in stack), *y.shape[bool(stack) : -1], *(sizes[c] for c in outputs))
        return y.transpose([given.index(c) for c in y_axes])

    perm = tuple(w_axes.index(c) for c in (*stack, *inputs, *outputs))
    bias = "bias" if module.use_bias else None
    return View("linear", "kernel", bias, perm, len(inputs), rows, back, module.dtype, n)


def _embed(module: nn.Embed, method_name: str, args: tuple, kwargs: dict) -> View | None:
    if method_name == "__call__":
        return View("embed", "embedding", None, (0, 1), 1, _same, _same, module.dtype)
    if method_name == "attend":
        return View("head", "embedding", None, (1, 0), 1, _same, _same, module.dtype)
    return None


def _conv(module: nn.Conv, method_name: str, args: tuple, kwargs: dict) -> View | None:
    size = (module.kernel_size,) if isinstance(module.kernel_size, int) else tuple(module.kernel_size)
    n = len(size)
    plain = module.padding in ("SAME", "VALID") or isinstance(module.padding, int | list | tuple)
    if method_name != "__call__" or module.feature_group_count != 1 or not plain or module.mask is not None:
        return None

    def each(value: Any) -> tuple:
        return (value,) * n if isinstance(value, int) or value is None else tuple(value)

    if any(d not in (None, 1) for d in each(module.input_dilation)):
        return None
    strides = tuple(s or 1 for s in each(module.strides))
    dilation = tuple(d or 1 for d in each(module.kernel_dilation))
    padding: Any = module.padding
    if not isinstance(padding, str):
        padding = [(p, p) if isinstance(p, int) else tuple(p) for p in each(padding)]

    def rows(x):
        lead, spatial, channels = x.shape[: -n - 1], x.shape[-n - 1 : -1], x.shape[-1]
        x = x.reshape(math.prod(lead), *spatial, channels)
        letters = "DHW"[-n:]
        patches = jax.lax.conv_general_dilated_patches(
            x,
            size,
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        )  # features come as (cin, *size); the kernel's order is (*size, cin)
        out = patches.shape[1:-1]
        patches = patches.reshape(-1, *out, channels, math.prod(size)).swapaxes(-1, -2)
        return patches.reshape(*lead, *out, -1)

    bias = "bias" if module.use_bias else None
    return View("conv", "kernel", bias, tuple(range(n + 2)), n + 1, rows, _same, module.dtype)


register(nn.Dense, _dense)
register(nn.DenseGeneral, _dense_general)
register(nn.Einsum, _einsum)
register(nn.Embed, _embed)
register(nn.Conv, _conv)
