"""Random weights in few bits, made of bits: no quantizer has a part in them."""

import jax.numpy as jnp
import numpy as np

from peftax.ops.qtensor import LEVELS, QTensor


def weight(fmt, k, n, *, group=32, lead=(), seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    if LEVELS[fmt] is None:
        packed = rng.integers(-127, 128, (*lead, k, n)).astype(np.int8)
    else:
        packed = rng.integers(0, 256, (*lead, k // 2, n)).astype(np.uint8)
    scale = rng.uniform(0.5, 1.5, (*lead, k // group, 1, n)) / np.sqrt(k) / (1 if LEVELS[fmt] is not None else 64)
    low = jnp.asarray(rng.normal(size=scale.shape) / k, jnp.float32) if fmt == "q4_1" else None
    return QTensor(jnp.asarray(packed), jnp.asarray(scale, jnp.float32), low, fmt=fmt, dtype=jnp.dtype(dtype))
