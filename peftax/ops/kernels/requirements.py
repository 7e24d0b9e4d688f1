"""What every Pallas kernel of this folder asks of a product before its own wishes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from peftax.ops.qtensor import QTensor


def refusal(w: QTensor, dtype: Any, *, formats: Collection[str], dtypes: Collection[str]) -> str | None:
    """Why a kernel of these formats and dtypes of x does not take this weight; None if it may."""
    if w.ndim != 2:
        return f"the weight has {w.ndim} axes; want [K, N]"
    if w.by_row:
        return "every row has its scale; want groups of rows"
    if w.fmt not in formats:
        return f"format {w.fmt!r}; this kernel has {', '.join(formats)}"
    if jnp.dtype(dtype).name not in dtypes:
        return f"x is {jnp.dtype(dtype).name}; want {' or '.join(dtypes)}"
    return None


def check(name: str, x: jax.Array, w: QTensor, *, transposed: bool, why_not: str | None) -> None:
    """Raise ValueError for what `supports` of the kernel `name` refuses, or where x does not contract with w."""
    if why_not is not None:
        raise ValueError(f"{name}.product: {why_not}")
    if x.shape[1] != w.shape[transposed]:
        raise ValueError(f"{name}.product: x {x.shape} does not contract with w {w.shape}, {transposed=}")
