"""Parameter-efficient fine-tuning for JAX and Flax."""

from peftax.core.injection import inject
from peftax.core.method import Ctx, Method, Partition, chain
from peftax.core.sites import Block, Site, Sites, count, find, register
from peftax.core.tree import merge, split
from peftax.methods import make

__all__ = [
    "Block",
    "Ctx",
    "Method",
    "Partition",
    "Site",
    "Sites",
    "chain",
    "count",
    "find",
    "inject",
    "make",
    "merge",
    "register",
    "split",
]
