"""Examples to token batches."""

from peftax.data.asset import fetch
from peftax.data.chat import Example, encode, encode_all, prompt_ids
from peftax.data.packing import pack, pad
from peftax.data.pipeline import Batches, batches, shuffle
from peftax.data.source import load

__all__ = [
    "Batches",
    "Example",
    "batches",
    "encode",
    "encode_all",
    "fetch",
    "load",
    "pack",
    "pad",
    "prompt_ids",
    "shuffle",
]
