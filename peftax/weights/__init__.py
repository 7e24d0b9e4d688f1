"""Base weights: from safetensors and GGUF to a parameter tree, from a tree to a HF folder."""

from peftax.weights.base import check, fingerprint, load, save
from peftax.weights.source import Source, open

__all__ = ["Source", "check", "fingerprint", "load", "open", "save"]
