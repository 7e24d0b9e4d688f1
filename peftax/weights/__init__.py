"""Base weights: from safetensors and GGUF to a parameter tree, from a tree to a HF folder."""

from peftax.weights.base import CLASSIFIER, as_filed, check, fingerprint, load, save, save_alone
from peftax.weights.source import Source, open

__all__ = ["CLASSIFIER", "Source", "as_filed", "check", "fingerprint", "load", "open", "save", "save_alone"]
