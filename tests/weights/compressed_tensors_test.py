import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from peftax.ops import qtensor
from peftax.weights import source
from peftax.weights.compressed_tensors import CompressedTensors

NAME = "model.layers.0.self_attn.k_proj"
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 12, "actorder": None}


def config(weights=None, group=None, **settings):
    scheme = {"targets": ["Linear"], "weights": WEIGHTS | (weights or {}), "input_activations": None} | (group or {})
    base = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": scheme}}
    return {"quantization_config": base | {"ignore": ["lm_head"]} | settings}


def draw(n=24, k=36, group=12, kind=np.float16, seed=0):
    """Signed codes [n, k], zero points and scales [n, k / group]."""
    rng = np.random.default_rng(seed)
    scales = np.asarray(jnp.asarray(rng.uniform(0.001, 0.1, (n, k // group)), kind))
    return rng.integers(-8, 8, (n, k)), rng.integers(-8, 8, (n, k // group)), scales


def numbers(codes, zeros, scales):
    w = np.zeros(codes.shape, np.float32)
    group = codes.shape[1] // scales.shape[1]
    for n in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            w[n, k] = np.float32(scales[n, k // group]) * np.float32(int(codes[n, k]) - int(zeros[n, k // group]))
    return w


def words(codes, axis):
    """int32 words of eight codes plus 8 along an axis, the first in the lowest bits; the last is filled up."""
    if axis == 0:
        return np.ascontiguousarray(words(codes.T, 1).T)
    out = np.zeros((codes.shape[0], -(-codes.shape[1] // 8)), np.uint32)
    for r in range(codes.shape[0]):
        for c in range(codes.shape[1]):
            out[r, c // 8] |= np.uint32((int(codes[r, c]) + 8) << 4 * (c % 8))
    return out.view(np.int32)


def pack(codes, zeros, scales):
    parts = {"weight_packed": words(codes, 1), "weight_scale": scales, "weight_shape": np.array(codes.shape, np.int64)}
    return parts if zeros is None else parts | {"weight_zero_point": words(zeros, 0)}


def lay(folder, parts, settings):
    folder.mkdir(exist_ok=True)
    plain = {"lm_head.weight": np.ones((4, 36), np.float16)}
    save_file({f"{NAME}.{part}": x for part, x in parts.items()} | plain, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return CompressedTensors(source.Safetensors(folder))


def same(found, codes, expected, fmt):
    name = f"{NAME}.weight"
    assert sorted(found.names()) == ["lm_head.weight", name] and found.packed("lm_head.weight") is None
    assert found.shape(name) == expected.shape and found.packed(name) == fmt
    np.testing.assert_array_equal(found.read(name), expected)
    w = found.read_packed(name)
    np.testing.assert_array_equal(w.packed, codes.T[0::2] + 8 + 16 * (codes.T[1::2] + 8))
    np.testing.assert_array_equal(qtensor.dense(w), expected.T)
    return w


@pytest.mark.parametrize("kind", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_symmetric(tmp_path, kind):
    codes, zeros, scales = draw(kind=kind)
    found = lay(tmp_path / "m", pack(codes, None, scales), config())
    w = same(found, codes, numbers(codes, 0 * zeros, scales), "q4_0")
    assert w.group == 12 and w.low is None


@pytest.mark.parametrize("kind", [jnp.float16, jnp.bfloat16])
def test_asymmetric(tmp_path, kind):
    drawn = draw(n=20, kind=kind)  # zero points fill their last words in part
    same(lay(tmp_path / "m", pack(*drawn), config({"symmetric": False})), drawn[0], numbers(*drawn), "q4_1")


def test_asymmetric_with_f32_scales_rounds_twice(tmp_path):
    codes, zeros, scales = drawn = draw(kind=jnp.float32)
    found, expected = lay(tmp_path / "m", pack(*drawn), config({"symmetric": False})), numbers(*drawn)
    np.testing.assert_array_equal(found.read(f"{NAME}.weight"), expected)
    dense = np.asarray(qtensor.dense(found.read_packed(f"{NAME}.weight")))
    assert np.abs(dense - expected.T).max() <= 2.0**-23 * 16 * scales.max()


def test_channels(tmp_path):
    codes, zeros, scales = draw(group=36)
    found = lay(tmp_path / "m", pack(codes, None, scales), config({"strategy": "channel", "group_size": None}))
    assert same(found, codes, numbers(codes, 0 * zeros, scales), "q4_0").group == 36


def test_two_config_groups(tmp_path):
    """Scales say which size is a weight's; its targets need not be matched."""
    codes, zeros, scales = draw()
    settings = config()
    groups = settings["quantization_config"]["config_groups"]
    groups["group_1"] = groups["group_0"] | {"weights": WEIGHTS | {"group_size": 18}}
    assert same(
        lay(tmp_path / "m", pack(codes, None, scales), settings), codes, numbers(codes, 0 * zeros, scales), "q4_0"
    )
    with pytest.raises(ValueError, match=r"weight_scale' has shape \(24, 4\), want .* config.json: 12, 18"):
        lay(tmp_path / "n", pack(*draw(group=9)), settings).read(f"{NAME}.weight")


def test_slices(tmp_path):
    drawn = draw(n=20)
    found, whole = lay(tmp_path / "m", pack(*drawn), config({"symmetric": False})), numbers(*drawn)
    for index in ((slice(3, 19), slice(5, 30)), (slice(8, 16), slice(0, 36)), (slice(19, 20), slice(35, 36))):
        np.testing.assert_array_equal(found.read(f"{NAME}.weight", index=index), whole[index])


def test_order(tmp_path):
    """actorder "weight" leaves the groups in order; "group" scatters them unless weight_g_idx says otherwise."""
    codes, zeros, scales = draw()
    parts, expected = pack(codes, None, scales), numbers(codes, 0 * zeros, scales)
    in_order = (np.arange(36) // 12).astype(np.int32)
    for order, more in (
        ("weight", {}),
        ("static", {}),
        ("group", {"weight_g_idx": in_order}),
        ("group", {"weight_g_idx": np.full(36, -1, np.int32)}),
    ):
        same(lay(tmp_path / "m", parts | more, config({"actorder": order})), codes, expected, "q4_0")
    found = lay(tmp_path / "m", parts | {"weight_g_idx": in_order[::-1].copy()}, config({"actorder": "group"}))
    with pytest.raises(ValueError, match=f"'{NAME}.weight_g_idx' scatters the groups"):
        found.packed(f"{NAME}.weight")
    with pytest.raises(ValueError, match=f"'{NAME}.weight_g_idx' is missing; config.json says actorder 'group'"):
        lay(tmp_path / "m", parts, config({"actorder": "group"})).shape(f"{NAME}.weight")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (config({"num_bits": 8}), "'group_0': compressed-tensors of 8 bits is not read"),
        (config({"type": "float"}), "'group_0': weights of type 'float' are not read"),
        (config({"strategy": "tensor", "group_size": None}), "'group_0': strategy 'tensor'"),
        (config({"group_size": 0}), "'group_0': strategy 'group' with group_size 0"),
        (config({"group_size": None}), "'group_0': strategy 'group' with group_size None"),
        (config(group={"input_activations": {"num_bits": 8}}), "'group_0': quantized activations"),
        (config(group={"format": "nvfp4-pack-quantized"}), "format 'nvfp4-pack-quantized' is not read"),
        (config(format="int-quantized"), "format 'int-quantized' is not read"),
        (config(sparsity_config={"format": "sparse-24-bitmask"}), "'sparse-24-bitmask' is not read"),
        (config(transform_config={"config_groups": {}}), "transform_config"),
        (config(config_groups={"W4A16": ["Linear"]}), "config_groups in config.json is"),
        (config(config_groups={}), "config_groups in config.json is"),
        (config(quant_method="bitsandbytes"), "quant_method is 'bitsandbytes'"),
    ],
)
def test_settings_that_are_not_read(tmp_path, settings, message):
    codes, _, scales = draw()
    with pytest.raises(ValueError, match=message):
        lay(tmp_path / "m", pack(codes, None, scales), settings)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weight_packed", lambda x: x[:, 1:], r"weight_packed' has shape \(20, 4\), want \(20, 5\)"),
        ("weight_packed", lambda x: np.repeat(x, 2, 1), "weight_packed' has shape"),  # eight bits a code
        ("weight_packed", lambda x: x.astype(np.float32), "weight_packed' is float32, want int32"),
        ("weight_scale", lambda x: x[:, 1:], r"weight_scale' has shape \(20, 2\), want \[20, 36 / group_size\]"),
        ("weight_scale", lambda x: x.astype(np.int8), "weight_scale' is int8, want floats"),
        ("weight_shape", lambda x: x[:1], "weight_shape' says"),
        ("weight_shape", lambda x: x[::-1], "weight_packed' has shape"),
        ("weight_zero_point", lambda x: x[1:], r"weight_zero_point' has shape \(2, 3\), want \(3, 3\)"),
        ("weight_zero_point", lambda x: np.zeros((20, 3), np.int8), "weight_zero_point' has shape"),
    ],
)
def test_corrupt(tmp_path, part, change, message):
    parts = pack(*draw(n=20))
    parts[part] = np.ascontiguousarray(change(parts[part]))
    found = lay(tmp_path / "m", parts, config({"symmetric": False}))
    for ask in (found.shape, found.packed, found.read, found.read_packed):
        with pytest.raises(ValueError, match=f"tensor '{NAME}.{message}"):
            ask(f"{NAME}.weight")


def test_missing_parts(tmp_path):
    codes, _, scales = draw()
    parts = pack(codes, None, scales)
    with pytest.raises(ValueError, match=f"'{NAME}.weight_zero_point' is missing; config.json says .* asymmetric"):
        lay(tmp_path / "m", parts, config({"symmetric": False})).read(f"{NAME}.weight")
    del parts["weight_scale"]
    with pytest.raises(ValueError, match=f"'{NAME}.weight_scale' is missing"):
        lay(tmp_path / "m", parts, config())
