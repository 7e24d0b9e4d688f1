"""Plain linen backbones, built from a Hugging Face config.json. A file that lists HF_TYPES is found by them."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@functools.cache
def types() -> dict[str, str]:
    """{Hugging Face model_type: the file that builds it}."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        file = importlib.import_module(f"{__name__}.{info.name}")
        found.update({kind: info.name for kind in file.HF_TYPES})
    return found


def build(config: Mapping[str, Any], **options: Any) -> nn.Module:
    """The model of a parsed config.json; options as in the model's `from_hf` (scan, remat, dtype, labels)."""
    kind = config.get("model_type")
    if kind not in types():
        raise ValueError(f"model_type {kind!r} has no backbone here; there are {', '.join(sorted(types()))}")
    return importlib.import_module(f"{__name__}.{types()[kind]}").from_hf(config, **options)


def abstract(model: nn.Module) -> dict[str, Any]:
    """The model's parameters as shapes."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
