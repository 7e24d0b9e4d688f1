"""Which kernel makes a product: by platform, by the weight's own word, and XLA where none fits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.ops import kernels
from peftax.ops.kernels import tpu
from peftax.ops.product import matmul
from peftax.ops.qtensor import dense
from tests.ops import packed


def lowered(platform, w, m=16, dtype=jnp.bfloat16):
    x = jax.ShapeDtypeStruct((m, w.shape[0]), dtype)
    run = jax.jit(lambda x: kernels.product(x, w, False))
    return run.trace(x).lower(lowering_platforms=(platform,)).as_text()


def test_a_tpu_takes_its_kernel_and_others_xla():
    w = packed.weight("nf4", 128, 256)
    assert "tpu_custom_call" in lowered("tpu", w)
    for platform in ("cpu", "cuda"):
        assert "custom_call" not in lowered(platform, w)


def test_the_weight_names_a_kernel():
    w = packed.weight("nf4", 128, 256)
    assert "custom_call" not in lowered("tpu", dataclasses.replace(w, kernel="xla"))
    assert "custom_call" not in lowered("cpu", dataclasses.replace(w, kernel="triton"))


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11), reason="later versions lower Triton only where a GPU is, or is named"
)
def test_a_gpu_takes_triton_where_the_weight_says_so():
    w = packed.weight("nf4", 128, 256)
    assert "triton" in lowered("cuda", dataclasses.replace(w, kernel="triton"))


def test_what_a_kernel_does_not_take_xla_makes(monkeypatch):
    """With one warning, on the machine that it concerns alone."""
    w = packed.weight("nf4", 128, 24)  # no whole lanes
    assert tpu.supports(w, 16, jnp.bfloat16, transposed=False)
    assert "custom_call" not in lowered("tpu", w)
    monkeypatch.setattr(kernels, "_platform", lambda: "tpu")
    kernels._warn.cache_clear()
    with pytest.warns(UserWarning, match="tpu kernel: K=128, N=24; want multiples.*XLA makes this product") as said:
        lowered("tpu", w)
        lowered("tpu", w)
    assert len(said) == 1


def test_on_this_machine_numbers_are_xlas():
    w = packed.weight("nf4", 128, 256)
    x = jax.random.normal(jax.random.key(0), (3, 128))
    for kernel in ("auto", *kernels.PLATFORM):
        y = jax.jit(matmul)(x, dataclasses.replace(w, kernel=kernel))
        np.testing.assert_allclose(y, x @ dense(w), rtol=1e-5, atol=1e-5)
