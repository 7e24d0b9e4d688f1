import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from peftax.ops import qtensor
from peftax.weights import source
from peftax.weights.gptq import Gptq

K, N, GROUP = 64, 24, 16
NAME = "model.layers.0.mlp.up_proj"
PLAIN = {
    "model.embed_tokens.weight": np.ones((5, K), np.float16),
    f"{NAME}.bias": np.arange(N, dtype=np.float16),
}
SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}


def draw(k=K, group=GROUP, low=1, seed=0):
    """Codes [k, N], zero points and f16 scales [k / group, N]."""
    rng = np.random.default_rng(seed)
    groups = -(-k // group)
    scales = (rng.uniform(0.001, 0.1, (groups, N)) * rng.choice([-1, 1], (groups, N))).astype(np.float16)
    return rng.integers(0, 16, (k, N)), rng.integers(low, 16, (groups, N)), scales


def numbers(codes, zeros, scales, group=GROUP):
    """The weight [N, K], one number at a time."""
    w = np.zeros(codes.T.shape, np.float32)
    for k in range(codes.shape[0]):
        for n in range(codes.shape[1]):
            g = k // group
            w[n, k] = np.float32(scales[g, n]) * np.float32(int(codes[k, n]) - int(zeros[g, n]))
    return w


def words(codes, axis):
    """int32 words of eight codes along an axis, the first in the lowest bits."""
    if axis:
        return np.ascontiguousarray(words(codes.T, 0).T)
    out = np.zeros((codes.shape[0] // 8, codes.shape[1]), np.uint32)
    for r in range(codes.shape[0]):
        for c in range(codes.shape[1]):
            out[r // 8, c] |= np.uint32(int(codes[r, c]) << 4 * (r % 8))
    return out.view(np.int32)


def pack(codes, zeros, scales, *, group=GROUP, v1=True):
    return {
        "qweight": words(codes, 0),
        "qzeros": words((zeros - v1) % 16, 1),
        "scales": scales,
        "g_idx": (np.arange(len(codes)) // group).astype(np.int32),
    }


def lay(folder, parts, **settings):
    folder.mkdir(exist_ok=True)
    save_file({f"{NAME}.{part}": x for part, x in parts.items()} | PLAIN, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": SETTINGS | settings}))
    return Gptq(source.Safetensors(folder))


def same(found, codes, expected):
    """Read whole and packed, the numbers are exactly those expected."""
    name = f"{NAME}.weight"
    assert found.shape(name) == expected.shape and found.dtype(name) == np.float32
    np.testing.assert_array_equal(found.read(name), expected)
    assert found.packed(name) == "q4_1"
    w = found.read_packed(name)
    assert w.shape == expected.T.shape and w.dtype == np.float32
    assert {type(x) for x in jax.tree.leaves(w)} == {np.ndarray}
    np.testing.assert_array_equal(w.packed & 15, codes[0::2])
    np.testing.assert_array_equal(w.packed >> 4, codes[1::2])
    np.testing.assert_array_equal(qtensor.dense(w), expected.T)
    np.testing.assert_array_equal(jax.jit(qtensor.dense)(w), expected.T)


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", None])
def test_numbers(tmp_path, kind):
    v1 = kind != "gptq_v2"
    drawn = draw(low=int(v1))
    found = lay(tmp_path / "m", pack(*drawn, v1=v1), **({"checkpoint_format": kind} if kind else {}))
    same(found, drawn[0], numbers(*drawn))
    assert found.read_packed(f"{NAME}.weight").group == GROUP


def test_one_group_and_bfloat16_scales(tmp_path):
    codes, zeros, scales = draw(group=K)
    scales = np.asarray(jnp.asarray(scales, jnp.bfloat16))
    found = lay(tmp_path / "m", pack(codes, zeros, scales, group=K), group_size=-1)
    same(found, codes, numbers(codes, zeros, scales, K))


def test_no_g_idx_and_a_group_above_k(tmp_path):
    drawn = draw(group=K)
    parts = pack(*drawn)
    del parts["g_idx"]
    same(lay(tmp_path / "m", parts, group_size=128), drawn[0], numbers(*drawn, K))


def test_slices(tmp_path):
    drawn = draw()
    found, whole = lay(tmp_path / "m", pack(*drawn)), numbers(*drawn)
    for index in ((slice(3, 21), slice(5, 50)), (slice(0, 8), slice(0, K)), (slice(9, 10), slice(63, 64))):
        np.testing.assert_array_equal(found.read(f"{NAME}.weight", index=index), whole[index])


def test_what_is_not_quantized_passes_through(tmp_path):
    found = lay(tmp_path / "m", pack(*draw()))
    assert sorted(found.names()) == sorted([*PLAIN, f"{NAME}.weight"])
    for name, value in PLAIN.items():
        assert found.packed(name) is None and found.shape(name) == value.shape and found.dtype(name) == np.float16
        np.testing.assert_array_equal(found.read(name), value)
    assert found.config["quantization_config"]["bits"] == 4 and found.tokenizer() is None
    with pytest.raises(ValueError, match="'model.embed_tokens.weight' is not held as a QTensor"):
        found.read_packed("model.embed_tokens.weight")
    with pytest.raises(ValueError, match=f"no tensor '{NAME}.qweight'; nearest: '{NAME}.weight'"):
        found.read(f"{NAME}.qweight")


def test_a_last_group_that_is_short(tmp_path):
    drawn = draw(k=40)
    found = lay(tmp_path / "m", pack(*drawn))
    np.testing.assert_array_equal(found.read(f"{NAME}.weight"), numbers(*drawn))
    assert found.packed(f"{NAME}.weight") is None
    with pytest.raises(ValueError, match="not held as a QTensor"):
        found.read_packed(f"{NAME}.weight")


def test_scattered_groups(tmp_path):
    parts = pack(*draw())
    parts["g_idx"] = np.random.default_rng(0).permutation(parts["g_idx"])
    found = lay(tmp_path / "m", parts, desc_act=True)
    for ask in (found.shape, found.packed, found.read, found.read_packed):
        with pytest.raises(ValueError, match=f"tensor '{NAME}.g_idx' scatters the groups .*act-order"):
            ask(f"{NAME}.weight")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 8}, "gptq of 8 bits is not read"),
        ({"bits": None}, "gptq of None bits"),
        ({"checkpoint_format": "marlin"}, "'marlin' is not read"),
        ({"is_marlin_format": True}, "'marlin' is not read"),
        ({"format": "bitblas"}, "'bitblas' is not read"),
        ({"pack_dtype": "int16"}, "int16 words"),
        ({"group_size": 0}, "group_size in config.json is 0"),
        ({"quant_method": "awq"}, "quant_method is 'awq', not 'gptq'"),
    ],
)
def test_settings_that_are_not_read(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        lay(tmp_path / "m", pack(*draw()), **settings)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("qweight", lambda x: x[:-1]),
        ("qweight", lambda x: x[:, :-1]),
        ("qweight", lambda x: x.astype(np.int64)),
        ("qweight", lambda x: x.reshape(-1)),
        ("qzeros", lambda x: x[:-1]),
        ("qzeros", lambda x: x.astype(np.float32)),
        ("scales", lambda x: x[:, 1:]),
        ("scales", lambda x: x.astype(np.int32)),
        ("g_idx", lambda x: x[1:]),
    ],
)
def test_corrupt(tmp_path, part, change):
    parts = pack(*draw())
    parts[part] = np.ascontiguousarray(change(parts[part]))
    found = lay(tmp_path / "m", parts)
    for ask in (found.shape, found.packed, found.read, found.read_packed):
        with pytest.raises(ValueError, match=rf"tensor '{NAME}\.\w+' (has shape .*|is \w+), want"):
            ask(f"{NAME}.weight")


def test_eight_bits_in_a_config_of_four(tmp_path):
    """What `dynamic` can make of single modules."""
    parts = pack(*draw())
    parts["qweight"] = np.concatenate([parts["qweight"]] * 2)
    with pytest.raises(ValueError, match=f"'{NAME}.scales' has shape"):
        lay(tmp_path / "m", parts).read(f"{NAME}.weight")
    with pytest.raises(ValueError, match=f"'{NAME}.g_idx' has shape .64,., want .128,. .four bits"):
        lay(tmp_path / "n", parts | pack(*draw(group=K)) | {"qweight": parts["qweight"]}, group_size=-1).read(
            f"{NAME}.weight"
        )


def test_wrong_group_size(tmp_path):
    with pytest.raises(ValueError, match=rf"'{NAME}.scales' has shape \(4, 24\), want \(2, 24\).*group_size 32"):
        lay(tmp_path / "m", pack(*draw()), group_size=32).read(f"{NAME}.weight")


def test_missing_parts(tmp_path):
    parts = pack(*draw())
    for part in ("qzeros", "scales"):
        with pytest.raises(ValueError, match=f"'{NAME}.{part}' is missing"):
            lay(tmp_path / "m", {key: x for key, x in parts.items() if key != part})
    with pytest.raises(ValueError, match="no tensor is called ….qweight"):
        lay(tmp_path / "m", {})
    with pytest.raises(ValueError, match=f"holds both '{NAME}.weight'"):
        lay(tmp_path / "m", parts | {"weight": np.ones((N, K), np.float16)})


def test_zero_points_that_writers_mean_differently(tmp_path):
    codes, zeros, scales = draw()
    zeros[1, 3] = 0  # stored as 15
    with pytest.raises(ValueError, match=f"'{NAME}.qzeros' holds 15"):
        lay(tmp_path / "m", pack(codes, zeros, scales)).read(f"{NAME}.weight")


def test_zero_points_against_sym(tmp_path):
    codes, zeros, scales = draw()
    zeros = np.full_like(zeros, 8)
    found = lay(tmp_path / "m", pack(codes, zeros, scales), sym=True)
    same(found, codes, numbers(codes, zeros, scales))
    found = lay(tmp_path / "n", pack(codes, zeros, scales, v1=False), sym=True)  # stores z, says z - 1
    with pytest.raises(ValueError, match=f"'{NAME}.qzeros' gives a zero point of 9 where sym"):
        found.read_packed(f"{NAME}.weight")
