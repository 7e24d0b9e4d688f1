"""A weight's numbers tile by tile, as XLA makes them for a GPU, against all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.ops.kernels import xla
from peftax.ops.quantize import quantize


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"fmt": "nf4", "group": 64, "double": True},
        {"fmt": "q4_1", "group": 32},
        {"fmt": "int8"},
    ],
    ids=lambda s: s["fmt"],
)
def test_tiles_equal_the_whole(settings, transposed, monkeypatch):
    w = quantize(jax.random.normal(jax.random.key(0), (192, 320)), **settings)
    x = jax.random.normal(jax.random.key(1), (5, 320 if transposed else 192))
    tiled = xla._in_tiles(x, w, transposed=transposed, tile=64)
    whole = xla.product(x, w, transposed=transposed)
    np.testing.assert_allclose(tiled, whole, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(xla, "TILE", 64 * (320 if transposed else 192) * 4)
    assert xla._tile(w, 4, transposed) == 64
    text = jax.jit(lambda x, w: xla.product(x, w, transposed=transposed)).trace(x, w)
    loops = {p: text.lower(lowering_platforms=(p,)).as_text().count("stablehlo.while") for p in ("cuda", "cpu", "tpu")}
    assert loops == {"cuda": 1, "cpu": 0, "tpu": 0}


def test_widths_that_no_tile_divides_stay_whole():
    w = quantize(jnp.ones((64, 100)), "int8")
    assert xla._tile(w, 1 << 20, False) is None
