import gc
import json
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from peftax import models, weights
from peftax.core import quantization, sites, tree
from peftax.ops.qtensor import LEVELS, QTensor, dense, dynamic_levels
from peftax.weights.bitsandbytes import Bitsandbytes, to_tensors
from peftax.weights.source import Safetensors
from tests.methods.tiny import CONFIG

F32 = np.float32
NAME = "model.layers.0.mlp.up_proj.weight"
STATE = "quant_state.bitsandbytes__nf4"
PLAIN = {"model.norm.weight": np.arange(6, dtype=F32), "lm_head.weight": np.ones((3, 4), ml_dtypes.bfloat16)}


def lay(shape, fmt="nf4", block=64, double=False, dtype="bfloat16", storage=np.uint8, seed=0):
    """A weight in bitsandbytes' keys, and its numbers, one at a time."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    blocks = -(-size // block)
    code = rng.integers(0, 16, size + size % 2)
    absmax = rng.uniform(0.01, 0.1, blocks).astype(F32)
    said = {"quant_type": fmt, "blocksize": block, "dtype": dtype, "shape": list(shape)}
    tensors = {NAME: (code[0::2] << 4 | code[1::2]).astype(np.uint8).view(storage)[:, None]}
    if double:
        stored = rng.integers(0, 256, blocks).astype(np.uint8)
        second = rng.uniform(0.01, 0.02, -(-blocks // 256)).astype(F32)
        offset = F32(0.0512)
        absmax = np.array([F32(dynamic_levels()[q] * second[i // 256]) + offset for i, q in enumerate(stored)])
        said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        tensors |= {f"{NAME}.nested_absmax": second, f"{NAME}.nested_quant_map": dynamic_levels().copy()}
    tensors |= {
        f"{NAME}.absmax": stored if double else absmax,
        f"{NAME}.quant_map": np.asarray(LEVELS[fmt], F32),
        f"{NAME}.quant_state.bitsandbytes__{fmt}": as_bytes(said),
    }
    numbers = [F32(LEVELS[fmt][code[i]]) * absmax[i // block] for i in range(size)]
    return tensors, np.asarray(numbers, F32).reshape(shape).astype(jnp.dtype(dtype))


def as_bytes(said):
    return np.frombuffer((said if isinstance(said, str) else json.dumps(said)).encode(), np.uint8).copy()


def save(folder, tensors, **settings):
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True} | settings
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": how}))
    return Bitsandbytes(Safetensors(folder))


KINDS = {
    "nf4": {},
    "nested": {"double": True},
    "fp4": {"fmt": "fp4", "dtype": "float16"},
    "large blocks": {"block": 128, "dtype": "float32"},
    "small blocks": {"block": 32, "double": True},
    "stored as bf16": {"storage": ml_dtypes.bfloat16, "double": True},
    "stored as f32": {"storage": F32},
}


@pytest.mark.parametrize("kind", KINDS)
def test_read(tmp_path, kind):
    tensors, numbers = lay((140, 128), **KINDS[kind])
    found = save(tmp_path, tensors | PLAIN)
    assert sorted(found.names()) == sorted([NAME, *PLAIN])
    assert (found.shape(NAME), found.dtype(NAME)) == ((140, 128), numbers.dtype)
    whole = found.read(NAME)
    assert whole.dtype == numbers.dtype
    np.testing.assert_array_equal(whole, numbers)
    for index in ((slice(0, 140), slice(0, 128)), (slice(3, 70), slice(5, 9)), (slice(139, 140), slice(0, 128))):
        np.testing.assert_array_equal(found.read(NAME, index=index), numbers[index])
    assert found.read(NAME, index=(slice(4, 4), slice(0, 8))).shape == (0, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(tmp_path, kind):
    """The bits of a QTensor mean the same numbers, and make the same keys and bytes."""
    tensors, numbers = lay((140, 128), **KINDS[kind])
    found = save(tmp_path, tensors)
    assert found.packed(NAME) == KINDS[kind].get("fmt", "nf4")
    w = found.read_packed(NAME)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(w))
    assert (w.shape, w.group, w.dtype) == ((128, 140), KINDS[kind].get("block", 64), numbers.dtype)
    np.testing.assert_array_equal(np.asarray(dense(w)).T, numbers)
    again = to_tensors(NAME, w, storage=KINDS[kind].get("storage", np.uint8))
    assert sorted(again) == sorted(tensors)
    for name, value in tensors.items():
        assert (again[name].dtype, again[name].shape) == (value.dtype, value.shape), name
        assert again[name].tobytes() == value.tobytes(), name


def small(fmt="nf4", double=False):
    """A QTensor [64, 2]."""
    return QTensor(
        np.zeros((32, 2), np.uint8),
        np.zeros((1, 1, 2), np.uint8 if double else F32),
        nested=np.ones(1, F32) if double else None,
        offset=F32(0.0512) if double else None,
        fmt=fmt,
        dtype=jnp.dtype("bfloat16"),
    )


def test_quant_state():
    """The JSON that bitsandbytes writes."""
    plain, double = (bytes(to_tensors(NAME, w)[f"{NAME}.{STATE}"]).decode() for w in (small(), small(double=True)))
    assert plain == '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64]}'
    offset = "0.05119999870657921"  # of the f32 nearest to 0.0512
    assert double == plain[:-1] + f', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {offset}}}'


def test_plain_weights(tmp_path):
    found = save(tmp_path, lay((2, 64))[0] | PLAIN)
    for name, value in PLAIN.items():
        assert (found.shape(name), found.dtype(name)) == (value.shape, value.dtype)
        np.testing.assert_array_equal(found.read(name), value)
        assert found.packed(name) is None
        with pytest.raises(ValueError, match=f"'{name}' is not packed"):
            found.read_packed(name)
    with pytest.raises(ValueError, match="no tensor 'lm_heda.weight'; nearest: .*lm_head.weight"):
        found.read("lm_heda.weight")


@pytest.mark.parametrize("shape", [(3, 96), (5, 33), (2, 3, 32), (7,)])
def test_no_whole_blocks(tmp_path, shape):
    """Blocks that straddle rows, a short last one, half a byte: numbers, but no QTensor."""
    tensors, numbers = lay(shape, dtype="float32")
    found = save(tmp_path, tensors)
    assert found.packed(NAME) is None
    np.testing.assert_array_equal(found.read(NAME), numbers)
    for i in range(shape[0]):
        index = (slice(i, i + 1), *(slice(0, n) for n in shape[1:]))
        np.testing.assert_array_equal(found.read(NAME, index=index), numbers[index])
    with pytest.raises(ValueError, match=r"blocks of 64 has no QTensor; read\(\) gives"):
        found.read_packed(NAME)


def test_other_levels(tmp_path):
    """The nested levels of another machine, an ulp off, are ours; levels of another kind are read, not kept packed."""
    tensors, _ = lay((4, 128), double=True, dtype="float32")
    key = f"{NAME}.nested_quant_map"
    near = tensors[key] * F32(1 + 2**-23)
    found = save(tmp_path, tensors | {key: near})
    assert found.packed(NAME) == "nf4"
    far = tensors[key] * F32(1.001)
    found = save(tmp_path, tensors | {key: far})
    assert found.packed(NAME) is None
    usual = save(tmp_path, tensors).read(NAME)
    changed = save(tmp_path, tensors | {key: far}).read(NAME)
    assert not np.array_equal(changed, usual)
    np.testing.assert_allclose(changed, usual, rtol=0.01, atol=1e-4)
    said = SAID | NESTED | {"nested_blocksize": 8, "shape": [4, 128]}
    halved = {f"{NAME}.{STATE}": as_bytes(said), f"{NAME}.nested_absmax": np.full(1, 0.02, F32)}
    assert save(tmp_path, tensors | halved).packed(NAME) is None
    found = save(tmp_path, tensors | {f"{NAME}.quant_map": np.linspace(-1, 1, 16, dtype=F32)})
    assert found.packed(NAME) is None


SAID = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64]}
NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}
CORRUPT = {
    "short": ({"": np.zeros((63, 1), np.uint8)}, r"uint8 \[63, 1\] is not the 64 bytes of shape \[2, 64\]"),
    "flat": ({"": np.zeros(64, np.uint8)}, r"uint8 \[64\] is not the 64 bytes"),
    "lost state": ({STATE: None}, "0 of quant_state.bitsandbytes__nf4 or fp4 beside it, not one"),
    "lost absmax": ({"absmax": None}, "no .absmax beside it"),
    "lost levels": ({"quant_map": None}, "no .quant_map beside it"),
    "absmax": ({"absmax": np.ones(3, F32)}, r".absmax is float32 \[3\], not float32 \[2\]"),
    "absmax type": ({"absmax": np.ones(2, np.uint8)}, r".absmax is uint8 \[2\], not float32 \[2\]"),
    "levels": ({"quant_map": np.ones(15, F32)}, r".quant_map is float32 \[15\], not float32 \[16\]"),
    "block": ({STATE: SAID | {"blocksize": 48}}, "blocksize 48; bitsandbytes has 32, 64"),
    "other block": ({STATE: SAID | {"blocksize": 32}}, r".absmax is float32 \[2\], not float32 \[4\]"),
    "half a block": ({STATE: SAID | {"blocksize": 64.0}}, "blocksize 64.0"),
    "shape": ({STATE: SAID | {"shape": [2, 128]}}, "is not the 128 bytes"),
    "no shape": ({STATE: SAID | {"shape": None}}, "shape None is none"),
    "dtype": ({STATE: SAID | {"dtype": "int8"}}, "dtype 'int8'; bitsandbytes has float32"),
    "type": ({STATE: SAID | {"quant_type": "af4"}}, "says quant_type 'af4'; read are nf4, fp4"),
    "types": ({STATE: SAID | {"quant_type": "fp4"}}, "bitsandbytes__nf4 says quant_type 'fp4'"),
    "JSON": ({STATE: '{"quant_type": "nf4",'}, f"{STATE} is no JSON object"),
    "a list": ({STATE: "[1]"}, f"{STATE} is no JSON object"),
    "not text": ({STATE: np.full(4, 255, np.uint8)}, f"{STATE} is no JSON object"),
    "lost nested": ({STATE: SAID | NESTED, "absmax": np.ones(2, np.uint8)}, "no .nested_absmax beside it"),
    "nested cut short": (
        {STATE: SAID | NESTED, "absmax": np.ones(2, np.uint8), "nested_absmax": np.ones(0, F32)},
        r".nested_absmax is float32 \[0\], not float32 \[1\]",
    ),
    "nested levels": (
        {
            STATE: SAID | NESTED,
            "absmax": np.ones(2, np.uint8),
            "nested_absmax": np.ones(1, F32),
            "nested_quant_map": np.ones(255, F32),
        },
        r".nested_quant_map is float32 \[255\], not float32 \[256\]",
    ),
    "offset": (
        {STATE: SAID | NESTED | {"nested_offset": float("nan")}, "absmax": np.ones(2, np.uint8)},
        "nested_offset nan is no number",
    ),
    "nested block": (
        {STATE: SAID | NESTED | {"nested_blocksize": 0}, "absmax": np.ones(2, np.uint8)},
        "nested_blocksize 0, nested_dtype 'float32'",
    ),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt(tmp_path, kind):
    """One line that names the tensor, from whatever is asked first."""
    changes, message = CORRUPT[kind]
    tensors, _ = lay((2, 64), dtype="float32")
    for part, value in changes.items():
        name = f"{NAME}.{part}" if part else NAME
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value if isinstance(value, np.ndarray) else as_bytes(value)
    for ask in ("shape", "dtype", "read", "packed", "read_packed"):
        with pytest.raises(ValueError, match=message) as caught:
            getattr(save(tmp_path, tensors), ask)(NAME)
        assert repr(NAME) in str(caught.value) and "\n" not in str(caught.value)


def test_corrupt_names(tmp_path):
    tensors, _ = lay((2, 64))
    del tensors[NAME]
    with pytest.raises(ValueError, match=f"but no '{NAME}'; fetch"):
        save(tmp_path, tensors)


def test_int8_is_refused(tmp_path):
    eight = {NAME: np.zeros((4, 4), np.int8), "model.layers.0.mlp.up_proj.SCB": np.ones(4, F32)}
    with pytest.raises(ValueError, match=r"tensor '.*up_proj.SCB' belongs to LLM.int8, which is not read"):
        save(tmp_path, eight)
    with pytest.raises(ValueError, match=r"config.json tells of LLM.int8, which is not read"):
        save(tmp_path, PLAIN, load_in_8bit=True)


def test_opened(tmp_path):
    tensors, numbers = lay((2, 64))
    save(tmp_path, tensors)
    found = weights.open(tmp_path)
    assert isinstance(found, Bitsandbytes) and found.config["model_type"] == "llama" and found.tokenizer() is None
    np.testing.assert_array_equal(found.read(NAME), numbers)


@pytest.mark.parametrize(
    ("w", "storage", "message"),
    [
        (small(fmt="int4"), np.uint8, r"holds nf4 and fp4 \[K, N\], not int4 \(64, 2\)"),
        (jax.tree.map(lambda x: x[None], small()), np.uint8, r"not nf4 \(1, 64, 2\)"),
        (
            jax.tree.map(lambda x: x[..., :1], small()),
            "S3",
            r"32 bytes are no whole number of \|S3; take storage uint8",
        ),
    ],
)
def test_what_is_not_written(w, storage, message):
    with pytest.raises(ValueError, match=message):
        to_tensors(NAME, w, storage=storage)


@pytest.mark.parametrize("scan", [True, False])
def test_a_saved_tree_is_read_as_it_lay(tmp_path, scan):
    """Rules pack some kernels; the folder that is written says which, and gives the same bits back."""
    config = {**CONFIG, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    model = models.build(config, scan=scan)
    shapes = models.abstract(model)
    found = sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    rules = (("self_attn", {"fmt": "nf4", "group": 32, "double": True}),)
    packed = quantization.quantize(params, rules, found)
    opened = weights.open(weights.save(packed, config, tmp_path / "saved"))
    paths = {s.kernel for s in found.values()}
    wanted = weights.as_filed(opened, shapes, paths)
    assert wanted.keys() == {p for p, x in tree.flatten(packed).items() if tree.is_packed(x)}
    read = weights.load(opened, tree.unflatten({**tree.flatten(shapes), **wanted}))
    assert jax.tree.structure(read) == jax.tree.structure(packed)
    jax.tree.map(np.testing.assert_array_equal, read, packed)
    skipped = opened.config["quantization_config"]["llm_int8_skip_modules"]
    assert "model.layers.1.mlp.down_proj" in skipped and "model.layers.1.self_attn.q_proj" not in skipped
    numbers = weights.load(opened, shapes)  # the same file as numbers
    q = tree.flatten(packed)[next(iter(sorted(wanted)))]
    np.testing.assert_array_equal(tree.flatten(numbers)[next(iter(sorted(wanted)))], dense(q))


class Watched(Safetensors):
    """Says how many of the arrays that it gave are alive when the next is asked for."""

    def __init__(self, path):
        super().__init__(path)
        self.given, self.alive = [], []

    def read(self, name, *, index=None):
        gc.collect()
        self.alive.append(sum(ref() is not None for ref in self.given))
        found = super().read(name, index=index)
        self.given.append(weakref.ref(found))
        return found


def test_one_tensor_of_numbers_at_a_time(tmp_path):
    config = {**CONFIG, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 4}
    model = models.build(config)
    shapes = models.abstract(model)
    found = sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    source = Watched(weights.save(params, config, tmp_path / "base"))
    rules = (("_proj/kernel", {"fmt": "nf4", "group": 32}),)
    read = weights.load(source, quantization.quantize(shapes, rules, found))
    jax.tree.map(np.testing.assert_array_equal, read, quantization.quantize(params, rules, found))
    assert len(source.alive) > 28 and max(source.alive) <= 1
