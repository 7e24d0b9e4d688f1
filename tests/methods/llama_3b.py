"""Llama 3.2 3B in shapes: counts that Hugging Face PEFT's method comparison (MetaMathQA) recorded are on it."""

import functools

import jax
import jax.numpy as jnp

from peftax import methods, models
from peftax.core import sites

CONFIG = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


@functools.cache
def found():
    model = models.build(CONFIG)
    shapes = models.abstract(model)
    return shapes, sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 3), jnp.int32))


def count(peft_config):
    """{"trainable": ..., "total": ...} of an adapter_config.json."""
    name, settings = methods.from_peft(peft_config)
    return count_of(methods.make(name, **settings))


def count_of(method):
    return sites.count(method, *found())
