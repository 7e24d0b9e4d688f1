import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from peftax.ops import qtensor
from peftax.weights import source
from peftax.weights.awq import Awq

K, N, GROUP = 48, 24, 16
NAME = "model.layers.0.self_attn.q_proj"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns that a word holds, lowest bits first
SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


def draw(seed=0):
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.001, 0.1, (K // GROUP, N)).astype(np.float16)
    return rng.integers(0, 16, (K, N)), rng.integers(0, 16, (K // GROUP, N)), scales


def numbers(codes, zeros, scales):
    w = np.zeros((N, K), np.float32)
    for k in range(K):
        for n in range(N):
            w[n, k] = np.float32(scales[k // GROUP, n]) * np.float32(int(codes[k, n]) - int(zeros[k // GROUP, n]))
    return w


def words(codes):
    out = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for row in range(out.shape[0]):
        for word in range(out.shape[1]):
            for nibble in range(8):
                out[row, word] |= np.uint32(int(codes[row, 8 * word + ORDER[nibble]]) << 4 * nibble)
    return out.view(np.int32)


def pack(codes, zeros, scales):
    return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales}


def lay(folder, parts, **settings):
    folder.mkdir(exist_ok=True)
    plain = {"model.norm.weight": np.ones(K, np.float16)}
    save_file({f"{NAME}.{part}": x for part, x in parts.items()} | plain, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": SETTINGS | settings}))
    return Awq(source.Safetensors(folder))


@pytest.mark.parametrize("settings", [{}, {"version": "GEMM"}, {"version": None, "checkpoint_format": "gemm"}])
def test_numbers(tmp_path, settings):
    drawn = draw()
    expected = numbers(*drawn)
    found = lay(tmp_path / "m", pack(*drawn), **settings)
    assert sorted(found.names()) == [f"{NAME}.weight", "model.norm.weight"]
    assert found.shape(f"{NAME}.weight") == (N, K) and found.packed(f"{NAME}.weight") == "q4_1"
    np.testing.assert_array_equal(found.read(f"{NAME}.weight"), expected)
    w = found.read_packed(f"{NAME}.weight")
    assert w.shape == (K, N) and w.group == GROUP
    np.testing.assert_array_equal(w.packed, drawn[0][0::2] + 16 * drawn[0][1::2])
    np.testing.assert_array_equal(qtensor.dense(w), expected.T)


def test_slices(tmp_path):
    drawn = draw()
    found, whole = lay(tmp_path / "m", pack(*drawn)), numbers(*drawn)
    for index in ((slice(3, 21), slice(5, 40)), (slice(8, 16), slice(0, K)), (slice(23, 24), slice(47, 48))):
        np.testing.assert_array_equal(found.read(f"{NAME}.weight", index=index), whole[index])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "awq of 3 bits is not read"),
        ({"version": "gemv"}, "'gemv' is not read; 'gemm' is"),
        ({"version": None, "format": "gemv_fast"}, "'gemv_fast' is not read"),
        ({"backend": "llm-awq"}, "'llm-awq' is not read"),
        ({"group_size": "128"}, "group_size in config.json is '128'"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq', not 'awq'"),
    ],
)
def test_settings_that_are_not_read(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        lay(tmp_path / "m", pack(*draw()), **settings)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qweight", lambda x: x[:, 1:], r"scales' has shape \(3, 24\), want \(3, 16\)"),
        ("qweight", lambda x: x.astype(np.uint8), "qweight' is uint8, want int32"),
        ("qweight", lambda x: x[:-8], "qweight': K is no multiple of group_size .K 40, N 24, group_size 16"),
        ("qzeros", lambda x: x[:, 1:], r"qzeros' has shape \(3, 2\), want \(3, 3\)"),
        ("scales", lambda x: x[1:], r"scales' has shape \(2, 24\), want \(3, 24\)"),
    ],
)
def test_corrupt(tmp_path, part, change, message):
    parts = pack(*draw())
    parts[part] = np.ascontiguousarray(change(parts[part]))
    found = lay(tmp_path / "m", parts)
    for ask in (found.shape, found.packed, found.read, found.read_packed):
        with pytest.raises(ValueError, match=f"{NAME}.{message}"):
            ask(f"{NAME}.weight")


def test_missing_zero_points(tmp_path):
    parts = pack(*draw())
    del parts["qzeros"]
    with pytest.raises(ValueError, match=f"'{NAME}.qzeros' is missing"):
        lay(tmp_path / "m", parts)
