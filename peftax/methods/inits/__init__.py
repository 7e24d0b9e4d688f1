"""Starting points of low-rank factors, one file each: a file's function bears its name; there is no other list.

A start is a function (key, w [in, out], rank, scale) -> (a [in, rank], b [rank, out]). Where MOVES is true, the base
is moved to w - scale a b, so that the adapted model begins as the untouched one.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import jax
import jax.numpy as jnp

from peftax.core import tree


def names() -> tuple[str, ...]:
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))


def module(name: str) -> ModuleType:
    """The file of a start. Raises ValueError naming the nearest where there is none."""
    if name not in names():
        raise ValueError(f"init {name!r} does not exist; the nearest: {tree.nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def padded(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """A decomposition's factors, with zeros to `rank` where it is above the kernel's smaller side: they do nothing,
    and files and counts have the rank that was asked for.
    """
    more = rank - a.shape[1]
    return jnp.pad(a, ((0, 0), (0, more))), jnp.pad(b, ((0, more), (0, 0)))
