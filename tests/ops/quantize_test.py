import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import quants

from peftax.ops.qtensor import GROUPS, LEVELS, codes, dense, dynamic_levels
from peftax.ops.quantize import dense_flat, quantize, quantize_flat

F32 = np.float32
K, N = 256, 24
# As outside the tests, where XLA may round a product together with the sum it goes into.
OPTIMIZED = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):  # later ones have no such option
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True


def draw(*shape, seed=0, spread=0.02):
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(F32)


def split(packed):
    """The codes of packed [K/2, N], by numpy."""
    packed = np.asarray(packed)
    return np.stack([packed & 15, packed >> 4], 1).reshape(-1, packed.shape[-1])


def nearest(w, fmt, group):
    """Codes and scales of nf4 and fp4 by their definition, in plain numpy."""
    levels = np.asarray(LEVELS[fmt], F32)
    order = np.argsort(levels, kind="stable")
    middles = (levels[order][1:] + levels[order][:-1]) / F32(2)
    scale = np.abs(w.reshape(-1, group, w.shape[1])).max(1, keepdims=True)
    inverse = F32(1) / np.maximum(scale, F32(1e-38))
    y = (w.reshape(-1, group, w.shape[1]) * inverse).reshape(w.shape)
    return order[np.searchsorted(middles, y)], scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fmt", ["nf4", "fp4"])
def test_levels(fmt, dtype):
    w = draw(K, N).astype(jnp.dtype(dtype))
    w[:64, 0] = 0
    made = quantize(w, fmt)
    code, scale = nearest(w.astype(F32), fmt, 64)
    np.testing.assert_array_equal(split(made.packed), code)
    np.testing.assert_array_equal(made.scale, scale)
    assert (made.shape, made.group, made.dtype) == ((K, N), 64, jnp.dtype(dtype))
    assert np.asarray(made.packed)[0, 0] == (0x77 if fmt == "nf4" else 0)


@pytest.mark.parametrize("group", GROUPS["nf4"])
def test_groups(group):
    w = draw(4096, 2, seed=group)
    made = quantize(w, "nf4", group=group)
    code, scale = nearest(w, "nf4", group)
    np.testing.assert_array_equal(split(made.packed), code)
    np.testing.assert_array_equal(made.scale, scale)


@pytest.mark.parametrize("fmt", ["nf4", "fp4"])
def test_middles(fmt):
    """A number half way between two levels takes the lower one, the next f32 the upper."""
    levels = np.sort(np.unique(np.asarray(LEVELS[fmt], F32)))
    middles = (levels[1:] + levels[:-1]) / F32(2)
    w = np.zeros((64, 2), F32)
    w[:1] = 1
    w[1 : len(middles) + 1, 0] = middles
    w[1 : len(middles) + 1, 1] = np.nextafter(middles, F32(2))
    found = np.asarray(LEVELS[fmt], F32)[split(quantize(w, fmt).packed)]
    np.testing.assert_array_equal(found[1 : len(middles) + 1, 0], levels[:-1])
    np.testing.assert_array_equal(found[1 : len(middles) + 1, 1], levels[1:])


def test_levels_are_kept():
    """Numbers that are a level times a power of two come back as they were."""
    for fmt in ("nf4", "fp4", "int4", "q4_0"):
        levels = np.asarray(LEVELS[fmt], F32)
        levels = np.where(levels == -8, 0, levels) if fmt == "int4" else levels
        w = np.tile(levels[:, None] * F32(2.0**-7), (8, 3))
        np.testing.assert_array_equal(dense(quantize(w, fmt)), w)


@pytest.mark.parametrize("fmt", ["nf4", "fp4"])
def test_denormals(fmt):
    """XLA takes numbers below 2^-126 for zero; the codes come from their bits."""
    w = draw(64, 3, spread=1)
    w[:, 0] *= F32(1e-39)
    w[:, 1] *= F32(2e-38)
    w[:, 2] = np.where(w[:, 2] > 0, F32(1e-40), F32(-1e-40))
    w[0, 2] = 1
    made = quantize(w, fmt)
    code, scale = nearest(w, fmt, 64)
    np.testing.assert_array_equal(split(made.packed), code)
    assert np.asarray(made.scale).tobytes() == scale.tobytes()


@pytest.mark.parametrize("fmt", ["q4_0", "q4_1", "q8_0"])
def test_gguf(fmt):
    kind = gguf.GGMLQuantizationType[fmt.upper()]
    rng = np.random.default_rng(3)
    w = draw(N, K) * rng.choice([1e-3, 1, 1e3], (N, 1)).astype(F32)
    w[0], w[1] = 0, rng.integers(-16, 17, K) * 7 / 16  # halves, where rounding shows
    w[2], w[3] = rng.integers(-30, 31, K) / 30, -np.abs(w[3])
    halves = np.resize(np.r_[0, 15, np.arange(15) + 0.5], 32) / 15
    w[4:12] = (rng.uniform(1, 2, (8, K // 32, 1)) * halves).reshape(8, K)
    raw = quants.quantize(w, kind)
    made = jax.jit(functools.partial(quantize, fmt=fmt), compiler_options=OPTIMIZED)(w.T)
    blocks = raw.reshape(N, K // 32, -1)
    at = 4 if fmt == "q4_1" else 2
    scale = blocks[..., :2].copy().view(np.float16)[..., 0]
    codes_ = blocks[..., at:].view(np.int8) if fmt == "q8_0" else None
    if codes_ is None:
        codes_ = np.concatenate([blocks[..., at:] & 15, blocks[..., at:] >> 4], -1)
    ours = made.packed if fmt == "q8_0" else codes(made.packed)
    np.testing.assert_array_equal(np.asarray(ours).T, codes_.reshape(N, K))
    np.testing.assert_array_equal(np.asarray(made.scale)[:, 0].T, scale)
    np.testing.assert_array_equal(np.asarray(dense(made)).T, quants.dequantize(raw, kind))


@pytest.mark.parametrize(("fmt", "top"), [("int4", 7), ("int8", 127)])
def test_whole_numbers(fmt, top):
    w = draw(K, N)
    made = quantize(w, fmt)
    groups = K // 64 if fmt == "int4" else 1
    assert made.scale.shape == (groups, 1, N)
    largest = np.abs(w.reshape(groups, -1, N)).max(1, keepdims=True)
    np.testing.assert_allclose(made.scale, largest / top, rtol=1e-7)
    error = np.abs(np.asarray(dense(made)) - w).reshape(groups, -1, N)
    assert (error <= 0.5001 * np.asarray(made.scale)).all()
    assert (error > 0.45 * np.asarray(made.scale)).any()
    code = np.asarray(made.packed if fmt == "int8" else (codes(made.packed) ^ 8).astype(np.int8) - 8)
    assert (code.min(), code.max()) == (-top, top)


def test_zeros():
    for fmt in LEVELS:
        assert not np.asarray(dense(quantize(np.zeros((64, 2), F32), fmt))).any(), fmt
    double = quantize(np.zeros((64, 2), F32), "nf4", double=True)
    assert not np.asarray(dense(double)).any() and not np.asarray(double.nested).any()


@pytest.mark.parametrize("fmt", LEVELS)
def test_not_finite(fmt):
    """A NaN stays to be seen."""
    w = draw(64, 2)
    w[3, 1] = np.nan
    found = np.asarray(dense(quantize(w, fmt)))
    assert np.isfinite(found[:, 0]).all() and np.isnan(found[3, 1])


def test_double():
    """The second codes by their definition: the table of 65536 places, blocks column after column, a short last one."""
    w = draw(K, 100) * np.linspace(0.5, 2, 100, dtype=F32)
    single, made = quantize(w, "nf4", group=64), quantize(w, "nf4", group=64, double=True)
    np.testing.assert_array_equal(single.packed, made.packed)
    flat = np.asarray(single.scale)[:, 0].T.reshape(-1)
    assert made.nested.shape == (2,) and made.offset.shape == ()
    np.testing.assert_allclose(made.offset, flat.mean(dtype=np.float64), rtol=2e-7)
    centred = np.pad(flat - np.asarray(made.offset), (0, 112)).reshape(2, 256)
    np.testing.assert_array_equal(made.nested, np.abs(centred).max(1))
    levels = dynamic_levels()
    y = centred * (F32(1) / np.asarray(made.nested)[:, None])
    place = ((y + F32(1)) * F32(0.5) * F32(65535) + F32(0.5)).astype(np.int64)
    value = (F32(-1) + F32(2) * place.astype(F32) / F32(65535)).astype(F32)
    code = np.searchsorted(F32(0.5) * (levels[1:] + levels[:-1]), value).reshape(-1)[:400]
    np.testing.assert_array_equal(np.asarray(made.scale)[:, 0].T.reshape(-1), code)
    np.testing.assert_allclose(dense(made), dense(single), atol=0.02 * np.abs(flat).max())


@pytest.mark.parametrize(
    ("n", "mean"),
    [  # by torch 2.13 on one thread; the exact mean has another last bit for all but the first
        (1, "0x1.99999a0000000p-4"),
        (7, "0x1.fe2be20000000p+1"),
        (31, "0x1.4666680000000p+2"),
        (600, "0x1.46098e0000000p+2"),
        (40000, "0x1.46632c0000000p+2"),
    ],
)
def test_offset(n, mean):
    """The order of the sum decides its last bits."""
    absmax = (np.arange(n) * 37 % 101 + 1).astype(F32) * F32(0.1)
    made = quantize(np.broadcast_to(absmax, (32, n)), "nf4", group=32, double=True)
    assert float.hex(float(made.offset)) == mean


@pytest.mark.parametrize("double", [False, True])
def test_under_jit_and_vmap(double):
    w = draw(2, 3, 128, 5)
    make = functools.partial(quantize, fmt="nf4", double=double)
    whole, jitted = make(w), jax.jit(make)(w)
    mapped = jax.vmap(jax.vmap(make))(w)
    one = make(w[1, 2])
    assert whole.shape == w.shape
    for a, b, c, d in zip(*map(jax.tree.leaves, (whole, jitted, mapped, one)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(a[1, 2], d)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory(dtype):
    """No second array of the input's size."""
    w = jax.ShapeDtypeStruct((4096, 4096), jnp.dtype(dtype))
    memory = jax.jit(lambda w: quantize(w, "nf4", double=True)).lower(w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.4 * w.size * w.dtype.itemsize


@pytest.mark.parametrize("size", [5, 64, 65, 200])
@pytest.mark.parametrize("fmt", ["nf4", "fp4"])
def test_flat(fmt, size):
    """Whole blocks as a matrix of one column has them, a short one, the first of two codes in the high half."""
    x = draw(size, seed=size)
    packed, absmax = quantize_flat(x, fmt, 64)
    assert packed.shape == ((size + 1) // 2,) and absmax.shape == (-(-size // 64),)
    padded = np.pad(x, (0, -size % 64))[:, None]
    code, scale = nearest(padded, fmt, 64)
    high_first = np.stack([np.asarray(packed) >> 4, np.asarray(packed) & 15], 1).reshape(-1)
    np.testing.assert_array_equal(high_first[:size], code[:size, 0])
    np.testing.assert_array_equal(absmax, scale.reshape(-1))
    if size % 2:
        assert LEVELS[fmt][high_first[-1]] == 0
    numbers = np.asarray(LEVELS[fmt], F32)[code[:size, 0]] * np.repeat(scale.reshape(-1), 64)[:size]
    np.testing.assert_array_equal(dense_flat(packed, absmax, fmt, 64, (size,)), numbers)
    half = dense_flat(packed, absmax, fmt, 64, (size, 1), jnp.bfloat16)
    np.testing.assert_array_equal(half, numbers.astype(jnp.bfloat16)[:, None])


def test_flat_divides():
    """A short last block divides by absmax where a whole one multiplies by its inverse: some codes differ."""
    bounds = np.asarray(LEVELS["nf4"], F32)
    bound = ((bounds[1:] + bounds[:-1]) / F32(2))[10]
    tops = np.random.default_rng(0).uniform(1, 2, 500).astype(F32)
    x = tops * bound
    differ = (x / tops > bound) != (x * (F32(1) / tops) > bound)
    x, top = x[differ][0], tops[differ][0]
    last, _ = quantize_flat(np.array([0] * 64 + [x, top], F32), "nf4", 64)
    whole, _ = quantize_flat(np.array([x, top] + [0] * 62, F32), "nf4", 64)
    assert last[-1] >> 4 == 10 + (x / top > bound)
    assert whole[0] >> 4 == 10 + (x * (F32(1) / top) > bound)


@pytest.mark.parametrize(
    ("shape", "fmt", "settings", "message"),
    [
        ((64, 2), "nf5", {}, "no format 'nf5'; nearest: nf4"),
        ((64, 2), "nf4", {"group": 48}, "nf4 has no group 48; it has 32, 64"),
        ((64, 2), "int8", {"group": 64}, "int8 has no group 64; it has one a column"),
        ((96, 2), "nf4", {}, r"K = 96 is not a multiple of the group 64; take group 32"),
        ((40, 2), "q4_0", {}, r"K = 40 is not a multiple of the group 32; leave .* or take int8"),
        ((64, 2), "int4", {"double": True}, "double quantization is for nf4 and fp4, not int4"),
        ((0, 128, 64), "nf4", {}, r"w \(0, 128, 64\) holds no numbers; leave it out"),
        ((64, 0), "int8", {}, r"w \(64, 0\) holds no numbers"),
        ((64,), "nf4", {}, r"wants floating \[..., K, N\], got float32 \(64,\)"),
    ],
)
def test_errors(shape, fmt, settings, message):
    with pytest.raises(ValueError, match=message):
        quantize(np.zeros(shape, F32), fmt, **settings)
    with pytest.raises(ValueError, match="wants floating"):
        quantize(np.zeros((64, 2), np.int32), "nf4")


def test_errors_flat():
    with pytest.raises(ValueError, match="for nf4 and fp4, not 'int4'"):
        quantize_flat(np.zeros(8, F32), "int4", 64)
    with pytest.raises(ValueError, match="nf4 has no block 65; it has 32, 64"):
        dense_flat(np.zeros(4, np.uint8), np.zeros(1, F32), "nf4", 65, (8,))
