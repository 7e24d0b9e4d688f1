"""Packed bytes, statistics and numbers equal those of bitsandbytes on CPU; its checkpoints go in and out unchanged."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: run with .venv-parity")

import bitsandbytes  # noqa: E402
import transformers  # noqa: E402
from bitsandbytes import functional  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from peftax.ops import quantize  # noqa: E402
from peftax.ops.product import matmul  # noqa: E402
from peftax.ops.qtensor import GROUPS, LEVELS, dense, dynamic_levels  # noqa: E402
from peftax.weights.bitsandbytes import Bitsandbytes, to_tensors  # noqa: E402
from peftax.weights.source import Safetensors  # noqa: E402

pytestmark = pytest.mark.parity
torch.set_num_threads(1)  # of many threads each sums a part of the scales' mean

F32 = np.float32
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NORMAL = 2.0**-126


@pytest.fixture(autouse=True)
def eager():
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles its fallbacks
        yield


def bits(x):
    """To compare; -0 as 0, which bitsandbytes' own code paths do not agree on in fp4."""
    x = np.asarray(x)
    return (x + x.dtype.type(0)).view(f"u{x.dtype.itemsize}")


def as_torch(x):
    """A jax array's numbers as torch holds them in the same type."""
    return torch.from_numpy(np.array(x, F32)).to(TYPES[x.dtype.name])


def as_numpy(x):
    return x.float().numpy().astype(jnp.dtype(str(x.dtype).removeprefix("torch.")))


def hard(block):
    """Blocks of zeros, of denormals, of middles between levels, of huge and of plain numbers, and a tail."""
    rng = np.random.default_rng(block)

    def middles(fmt):
        levels = np.sort(np.asarray(LEVELS[fmt], F32))
        at = (levels[1:] + levels[:-1]) / F32(2)
        beside = [np.nextafter(at, F32(to)) for to in (-2, 2)]
        return np.resize(np.concatenate([[F32(1)], at, *beside]), block)

    blocks = [
        np.zeros(block),
        rng.standard_normal(block) * 1e-39,
        rng.integers(-5, 6, block) * 2.0**-149,
        rng.standard_normal(block) * 2e-38,
        rng.choice([0.0, -0.0, 1e-40, -1e-40, 2.0**-149, -(2.0**-149), 3e-38, 2.0], block),
        rng.choice([1e-40, 2.0**-149, 1.0], block),
        rng.standard_normal(block) * 1e30,
        middles("nf4"),
        -middles("nf4"),
        middles("fp4"),
        rng.standard_normal(block) * 0.02,
        rng.standard_normal(37) * 3,
    ]
    return np.concatenate(blocks).astype(F32)


def test_levels():
    for fmt in ("nf4", "fp4"):
        ours = np.asarray(LEVELS[fmt], F32)
        assert ours.tobytes() == functional.get_4bit_type(fmt, device="cpu").numpy().tobytes()
    theirs = functional.create_dynamic_map().numpy()
    np.testing.assert_allclose(dynamic_levels(), theirs, rtol=0, atol=6e-8)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert dynamic_levels().tobytes() == theirs.tobytes()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("block", GROUPS["nf4"])
@pytest.mark.parametrize("fmt", ["nf4", "fp4"])
def test_flat(fmt, block, dtype):
    x = jnp.asarray(hard(block)).clip(-6e4, 6e4) if dtype == "float16" else jnp.asarray(hard(block))
    theirs, state = functional.quantize_4bit(as_torch(x := x.astype(dtype)), blocksize=block, quant_type=fmt)
    packed, absmax = quantize.quantize_flat(x, fmt, block)
    np.testing.assert_array_equal(packed, theirs.numpy().reshape(-1))
    assert np.asarray(absmax).tobytes() == state.absmax.numpy().tobytes()

    numbers = as_numpy(functional.dequantize_4bit(theirs, state))
    ours = np.array(quantize.dense_flat(packed, absmax, fmt, block, x.shape, x.dtype))
    tiny = (np.abs(numbers.astype(F32)) < NORMAL) & (dtype != "float16")
    assert not ours[tiny].any()  # XLA for CPU takes them for zero
    np.testing.assert_array_equal(bits(ours)[~tiny], bits(numbers)[~tiny])


@pytest.mark.parametrize("size", [1, 2, 17, 63, 65])
def test_short(size):
    """Less than a block, and one number more."""
    x = jnp.asarray(np.random.default_rng(size).standard_normal(size), jnp.float32)
    for fmt in ("nf4", "fp4"):
        theirs, state = functional.quantize_4bit(as_torch(x), blocksize=64, quant_type=fmt)
        packed, absmax = quantize.quantize_flat(x, fmt, 64)
        np.testing.assert_array_equal(packed, theirs.numpy().reshape(-1))
        np.testing.assert_array_equal(absmax, state.absmax.numpy())


def test_short_divides():
    """A last block bitsandbytes divides by absmax; a whole one it multiplies by the inverse, which rounds otherwise."""
    levels = np.asarray(LEVELS["nf4"], F32)
    bound = ((levels[1:] + levels[:-1]) / F32(2))[10]
    tops = np.random.default_rng(0).uniform(1, 2, 500).astype(F32)
    x = tops * bound
    differ = (x / tops > bound) != (x * (F32(1) / tops) > bound)
    for pair in list(zip(x[differ], tops[differ], strict=True))[:8]:
        for numbers in (np.resize(np.array(pair, F32), 64), np.resize(np.array(pair, F32), 34)):
            theirs, _ = functional.quantize_4bit(torch.from_numpy(numbers), blocksize=64, quant_type="nf4")
            np.testing.assert_array_equal(quantize.quantize_flat(numbers, "nf4", 64)[0], theirs.numpy().reshape(-1))


@pytest.mark.parametrize(
    ("n", "k", "block", "dtype"),
    [  # 7, 24, 6, 330, 36864 scales: each takes another way through the sum
        (7, 64, 64, "float32"),
        (3, 256, 32, "float16"),
        (3, 8192, 4096, "bfloat16"),
        (11, 1920, 64, "float32"),
        (576, 2048, 32, "bfloat16"),
    ],
)
def test_matrix(n, k, block, dtype):
    """Double quantization too: codes of the scales, their scales, their mean, the numbers."""
    rng = np.random.default_rng(k)
    w_KxN = jnp.asarray((rng.standard_normal((n, k)) * rng.choice([0.02, 0.05], (n, 1))).T, dtype)
    ours = quantize.quantize(w_KxN, "nf4", group=block, double=True)
    theirs, state = functional.quantize_4bit(
        as_torch(w_KxN.T), blocksize=block, quant_type="nf4", compress_statistics=True
    )
    made = to_tensors("w", ours)
    assert made["w"].tobytes() == theirs.numpy().tobytes()
    assert made["w.absmax"].tobytes() == state.absmax.numpy().tobytes()
    assert made["w.nested_absmax"].tobytes() == state.state2.absmax.numpy().tobytes()
    assert np.asarray(ours.offset).tobytes() == state.offset.numpy().tobytes()
    numbers = as_numpy(functional.dequantize_4bit(theirs, state))
    np.testing.assert_array_equal(bits(jax.jit(dense)(ours).T), bits(numbers))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("fmt", ["nf4", "fp4"])
def test_product_and_its_gradient(fmt, double):
    """Against MatMul4Bit: y, and dx from the same dy."""
    rng = np.random.default_rng(0)
    w_KxN, x, dy = (rng.standard_normal(shape).astype(F32) for shape in ((128, 96), (2, 5, 128), (2, 5, 96)))
    theirs, state = functional.quantize_4bit(
        torch.from_numpy(w_KxN.T.copy()), blocksize=64, quant_type=fmt, compress_statistics=double
    )
    x_t = torch.from_numpy(x).requires_grad_()
    y_t = bitsandbytes.matmul_4bit(x_t, theirs.t(), quant_state=state)
    y_t.backward(torch.from_numpy(dy))
    ours = quantize.quantize(jnp.asarray(w_KxN), fmt, group=64, double=double)
    y, back = jax.vjp(lambda x: matmul(x, ours), jnp.asarray(x))
    for mine, other in ((y, y_t.detach()), (back(jnp.asarray(dy))[0], x_t.grad)):
        np.testing.assert_allclose(mine, other.numpy(), rtol=1e-5, atol=1e-5 * float(other.abs().max()))


SIZES = {
    "vocab_size": 61,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("fmt", "double", "storage"), [("nf4", True, "bfloat16"), ("nf4", False, "uint8"), ("fp4", True, "float32")]
)
def test_checkpoint(plain, tmp_path, fmt, double, storage):
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=fmt,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
        bnb_4bit_compute_dtype=torch.float32,
    )
    kind = transformers.LlamaForCausalLM
    model = kind.from_pretrained(plain, quantization_config=how, dtype=torch.bfloat16, device_map="cpu")
    model.save_pretrained(tmp_path / "theirs")
    found = Bitsandbytes(Safetensors(tmp_path / "theirs"))
    original = Safetensors(plain)
    assert sorted(found.names()) == sorted(original.names())

    out = {}
    for name in found.names():
        assert found.shape(name) == original.shape(name)
        if found.packed(name) is None:
            out[name] = found.read(name)
            continue
        assert found.packed(name) == fmt
        weight = model.get_parameter(name)
        numbers = as_numpy(functional.dequantize_4bit(weight.data, weight.quant_state))
        w = found.read_packed(name)
        np.testing.assert_array_equal(bits(found.read(name)), bits(numbers))
        np.testing.assert_array_equal(bits(dense(w).T), bits(numbers))
        again = quantize.quantize(jnp.asarray(original.read(name).T), fmt, double=double)
        pairs = zip(jax.tree.leaves(again), jax.tree.leaves(w), strict=True)
        assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
        out |= to_tensors(name, w, storage=jnp.dtype(storage))
    assert sum(found.packed(name) == fmt for name in found.names()) == 14

    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert sorted(out) == sorted(theirs)
    for name, value in theirs.items():
        assert (out[name].dtype, out[name].shape) == (value.dtype, value.shape), name
        assert out[name].tobytes() == value.tobytes(), name

    (tmp_path / "ours").mkdir()
    save_file(out, tmp_path / "ours" / "model.safetensors", {"format": "pt"})
    shutil.copy(tmp_path / "theirs" / "config.json", tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        logits = [kind.from_pretrained(tmp_path / who, device_map="cpu")(ids).logits for who in ("theirs", "ours")]
    assert torch.equal(*logits) and logits[0].isfinite().all()
