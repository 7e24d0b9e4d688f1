import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.ops.product import matmul
from peftax.ops.qtensor import GROUPS, LEVELS, QTensor, codes, dense, dynamic_levels, look_up, scales, values

F32 = np.float32
K, N, GROUP = 128, 6, 32
# As outside the tests, where XLA may round a product together with the sum it goes into.
OPTIMIZED = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):  # later ones have no such option
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True


def packed(fmt, *lead, seed=0):
    rng = np.random.default_rng(seed)
    if LEVELS[fmt] is None:
        return rng.integers(-127, 128, (*lead, K, N)).astype(np.int8)
    return rng.integers(0, 256, (*lead, K // 2, N)).astype(np.uint8)


def weight(fmt, *lead, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.01, 0.1, (*lead, K // GROUP, 1, N)).astype(F32)
    low = -scale if fmt == "q4_1" else None
    return QTensor(packed(fmt, *lead, seed=seed), scale, low, fmt=fmt, dtype=jnp.dtype(dtype))


def nested(n, *lead, seed=0):
    """More than 256 scales a matrix where n is large, so that the second scales are told apart."""
    rng = np.random.default_rng(seed)
    blocks = K // GROUP
    return QTensor(
        rng.integers(0, 256, (*lead, K // 2, n)).astype(np.uint8),
        rng.integers(0, 256, (*lead, blocks, 1, n)).astype(np.uint8),
        nested=rng.uniform(0.01, 0.1, (*lead, -(-blocks * n // 256))).astype(F32),
        offset=rng.uniform(0.1, 0.2, lead).astype(F32),
        fmt="nf4",
    )


def by_hand(w):
    """Number by number, of one matrix."""
    out = np.zeros(w.shape, F32)
    levels = LEVELS[w.fmt]
    for k in range(K):
        for n in range(w.shape[-1]):
            if levels is None:
                level = F32(w.packed[k, n])
            else:
                level = F32(levels[w.packed[k // 2, n] >> 4 if k % 2 else w.packed[k // 2, n] & 15])
            at = k // w.group
            scale = F32(w.scale[at, 0, n])
            if w.double:
                second = w.nested[(n * w.scale.shape[0] + at) // 256]
                scale = F32(dynamic_levels()[w.scale[at, 0, n]] * second) + w.offset
            out[k, n] = level * scale + (0 if w.low is None else w.low[at, 0, n])
    return out


@pytest.mark.parametrize("fmt", LEVELS)
def test_dense(fmt):
    w = weight(fmt)
    assert (w.shape, w.ndim, w.size, w.group, w.double) == ((K, N), 2, K * N, GROUP, False)
    # a sum of two products' parts may be rounded once or twice
    close = {"rtol": 0, "atol": 1e-7 if fmt == "q4_1" else 0}
    np.testing.assert_allclose(dense(w), by_hand(w), **close)
    np.testing.assert_allclose(jax.jit(dense)(w), by_hand(w), **close)
    for dtype in ("bfloat16", "float16"):
        half = dense(w.astype(dtype))
        assert half.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(half, np.asarray(dense(w)).astype(jnp.dtype(dtype)))


def test_dense_of_an_array():
    x = jnp.ones((2, 3))
    assert dense(x) is x


def test_half_scales():
    """GGUF's scales are f16; the product is taken in f32."""
    w = weight("q4_0")
    half = QTensor(w.packed, w.scale.astype(np.float16), fmt="q4_0")
    full = QTensor(w.packed, w.scale.astype(np.float16).astype(F32), fmt="q4_0")
    np.testing.assert_array_equal(dense(half), dense(full))


@pytest.mark.parametrize("n", [5, 100])
def test_double(n):
    """Scales are numbered column after column; product and sum are rounded each by itself, jitted too."""
    w = nested(n)
    expected = by_hand(w)
    np.testing.assert_array_equal(dense(w), expected)
    np.testing.assert_array_equal(jax.jit(dense, compiler_options=OPTIMIZED)(w), expected)
    assert scales(w).shape == (K // GROUP, 1, n)


def test_leading_axes():
    """Stacked layers, each with its own nested scales, and what scan and vmap make of them."""
    w = nested(70, 2, 3)
    assert w.shape == (2, 3, K, 70)
    whole = np.asarray(dense(w))
    one = jax.tree.map(lambda x: x[1, 2], w)
    np.testing.assert_array_equal(whole[1, 2], dense(one))
    assert one.shape == (K, 70) and one.offset.shape == ()
    np.testing.assert_array_equal(jax.vmap(jax.vmap(dense))(w), whole)
    layers = jax.tree.map(lambda x: jnp.asarray(x[1]), w)
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, dense(layer)), 0, layers)
    np.testing.assert_array_equal(scanned, whole[1])


def test_pytree():
    w = weight("nf4", dtype="bfloat16")
    leaves, shape = jax.tree.flatten(w)
    assert len(leaves) == 2 and len(jax.tree.leaves(nested(5))) == 4
    again = jax.tree.unflatten(shape, leaves)
    assert (again.fmt, again.dtype, again.shape) == ("nf4", jnp.bfloat16, (K, N))
    assert jax.tree.structure(w) != jax.tree.structure(weight("fp4", dtype="bfloat16"))


def test_parts():
    w = weight("fp4")
    code = np.asarray(codes(w.packed))
    np.testing.assert_array_equal(code[0::2], w.packed & 15)
    np.testing.assert_array_equal(code[1::2], w.packed >> 4)
    np.testing.assert_array_equal(values(w), np.asarray(LEVELS["fp4"], F32)[code])
    table = tuple(float(i * i) for i in range(16))
    np.testing.assert_array_equal(look_up(jnp.arange(16, dtype=jnp.uint8), table), np.asarray(table, F32))


BROKEN = {
    "format": ({"fmt": "nf5"}, "'nf5': no such format; there are nf4, fp4"),
    "kind": ({"packed": np.zeros((K // 2, N), np.int8)}, "packed is int8, not uint8"),
    "short": ({"packed": np.zeros((K // 2 - 1, N), np.uint8)}, r"scales \(4, 1, 6\) are not .* of a weight \(126, 6\)"),
    "columns": ({"scale": np.ones((4, 1, 5), F32)}, r"scales \(4, 1, 5\) are not"),
    "groups": ({"scale": np.ones((3, 1, N), F32)}, r"scales \(3, 1, 6\) are not \[..., K/group, 1, N\]"),
    "flat": ({"scale": np.ones((4, N), F32)}, r"scales \(4, 6\) are not"),
    "low": ({"low": np.ones((4, 1, N), F32)}, "q4_1, and no other"),
    "no low": ({"fmt": "q4_1"}, "q4_1, and no other format"),
    "half double": ({"scale": np.ones((4, 1, N), np.uint8)}, "come together"),
    "no offset": ({"scale": np.ones((4, 1, N), np.uint8), "nested": np.ones(1, F32)}, "come together"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_arrays_that_do_not_belong_together(kind):
    """One line, from numbers and from a product."""
    change, message = BROKEN[kind]
    w = dataclasses.replace(weight("nf4"), **change)
    for ask in (dense, lambda w: matmul(jnp.ones((2, K)), w)):
        with pytest.raises(ValueError, match=message) as caught:
            ask(w)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"nested": np.ones(1, F32)}, {"offset": np.ones(2, F32)}])
def test_nested_scales_that_are_cut_short(change):
    w = dataclasses.replace(nested(100), **change)  # 400 scales, two nested ones
    with pytest.raises(ValueError, match=r"want \(2,\) and \(\), one for 256 scales"):
        dense(w)


def test_levels():
    """Sixteen to a format; bitsandbytes' in its bits."""
    assert set(GROUPS) == set(LEVELS)
    assert all(levels is None or len(levels) == 16 for levels in LEVELS.values())
    nf4, fp4 = (np.asarray(LEVELS[fmt], F32) for fmt in ("nf4", "fp4"))
    assert (np.diff(nf4) > 0).all() and (nf4[0], nf4[7], nf4[15]) == (-1, 0, 1)
    np.testing.assert_array_equal(fp4[8:], -fp4[:8])
    assert not np.signbit(fp4[[0, 8]]).any()
    assert fp4.view(np.int32)[:4].tolist() == [0, 1001040555, 1059760811, 1065353216]
    assert LEVELS["int4"] == tuple((i ^ 8) - 8 for i in range(16))


def test_dynamic_levels():
    levels = dynamic_levels()
    assert levels.shape == (256,) and levels.dtype == F32 and not levels.flags.writeable
    assert (np.diff(levels) > 0).all() and levels[127] == 0 and levels[-1] == 1
    np.testing.assert_array_equal(levels[:127], -levels[128:-1][::-1])
    np.testing.assert_allclose(levels[[0, 128, 254]], [-0.99296875, 5.5e-7, 0.99296875], rtol=1e-6)
    assert hashlib.sha256(levels.tobytes()).hexdigest()[:16] == "e732639a65f497b4"
