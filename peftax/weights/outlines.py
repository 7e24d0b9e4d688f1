"""Models of which only config.json is known: shapes without weights, for counting and planning.

Source: the config.json of each repository on the Hugging Face hub; of their keys those that shapes and rope need.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftax.core import tree as trees
from peftax.weights.source import Source, read_json


def _llama(hidden: int, wide: int, layers: int, heads: int, *, factor: float = 8.0, **more: Any) -> dict[str, Any]:
    rope = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "model_type": "llama",
        **dict(hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads),
        **dict(num_key_value_heads=8, vocab_size=128256, rms_norm_eps=1e-5, rope_theta=500000.0),
        "rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 8192, **rope},
        **more,
    }


def _qwen3(hidden: int, wide: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        **dict(hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads),
        **dict(num_key_value_heads=8, head_dim=128, vocab_size=151936, rms_norm_eps=1e-6, rope_theta=1000000.0),
    }


def _mistral(hidden: int, wide: int, layers: int, vocab: int, theta: float) -> dict[str, Any]:
    return {
        "model_type": "mistral",
        **dict(hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=32),
        **dict(num_key_value_heads=8, head_dim=128, vocab_size=vocab, rms_norm_eps=1e-5, rope_theta=theta),
        "sliding_window": None,
    }


KNOWN: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M": {
        "model_type": "llama",
        **dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9),
        **dict(num_key_value_heads=3, vocab_size=49152, rms_norm_eps=1e-5, rope_theta=100000.0),
        "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.2-1B": _llama(2048, 8192, 16, 32, factor=32.0, head_dim=64, tie_word_embeddings=True),
    "meta-llama/Llama-3.2-3B": _llama(3072, 8192, 28, 24, factor=32.0, head_dim=128, tie_word_embeddings=True),
    "meta-llama/Llama-3.1-8B": _llama(4096, 14336, 32, 32),
    "meta-llama/Llama-3.1-70B": _llama(8192, 28672, 80, 64),
    "meta-llama/Llama-3.1-405B": _llama(16384, 53248, 126, 128),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64),
    "mistralai/Mistral-7B-v0.3": _mistral(4096, 14336, 32, 32768, 1000000.0),
    "mistralai/Mistral-Small-24B-Base-2501": _mistral(5120, 32768, 40, 131072, 100000000.0),
}


class Outline(Source):
    """A checkpoint whose weights are not here."""

    def __init__(self, path: str, config: Mapping[str, Any]):
        self.path, self._config = Path(path), config
        if how := config.get("quantization_config"):
            raise ValueError(
                f"{path}: its weights lie in few bits ({how.get('quant_method')}), of which only the files say how; "
                "fetch them, or plan the float model with config.model.quantize"
            )

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    def names(self) -> list[str]:
        raise self._none()

    def shape(self, name: str) -> tuple[int, ...]:
        raise self._none()

    def dtype(self, name: str) -> np.dtype:
        raise self._none()

    def read(self, name: str, *, index: tuple[slice, ...] | None = None) -> np.ndarray:
        raise self._none()

    def tokenizer(self) -> None:
        return None

    def _none(self) -> ValueError:
        return ValueError(f"{self.path}: only its shapes are known here; fetch the weights to use it")


def holds_weights(path: str) -> bool:
    """Do weights lie there, whose headers say more than config.json?"""
    where = Path(path).expanduser()
    if where.is_dir():
        return any(where.glob("*.safetensors")) or any(where.glob("*.gguf"))
    return where.exists() and where.suffix != ".json"


def outline(path: str) -> Outline:
    """The shapes of a model: of a folder or file with its config.json, of one that is KNOWN by its hub id, or of the
    hub's config.json.
    """
    where = Path(path).expanduser()
    file = where if where.suffix == ".json" else where / "config.json"
    if file.exists():
        return Outline(path, read_json(file))
    if (known := path.replace("Llama-3.3", "Llama-3.1").removesuffix("-Instruct")) in KNOWN:  # of the same shapes
        return Outline(path, KNOWN[known])
    from huggingface_hub import constants, hf_hub_download

    try:
        return Outline(path, read_json(hf_hub_download(path, "config.json", local_files_only=constants.HF_HUB_OFFLINE)))
    except Exception as error:  # the hub raises many kinds
        raise FileNotFoundError(
            f"{path}: no folder with a config.json, not on the hub or in its cache, and none of the models known by "
            f"name; the nearest: {trees.nearest(path, KNOWN)}; or give the path of its config.json"
        ) from error
