"""A tiny base with a tokenizer on disk, and a config that trains on it in a second."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from peftax import models, recipe, weights
from tests.data import tiny

CONFIG = dict(
    model_type="llama",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=400,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    eos_token_id=1,
)


def base_folder(into: Path, seed: int = 0, tokenizer: Any = None, **sizes: Any) -> Path:
    tokenizer = tokenizer or tiny.tokenizer()
    config = {**CONFIG, "vocab_size": len(tokenizer), **sizes}
    params = models.build(config).init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    return weights.save(params, config, into, tokenizer=tokenizer)


def data_file(into: Path, rows: int = 24) -> Path:
    chats = [
        {"messages": [{"role": "user", "content": f"add {i} and {j}"}, {"role": "assistant", "content": str(i + j)}]}
        for i in range(rows // 4)
        for j in range(4)
    ]
    into.write_text("".join(json.dumps(c) + "\n" for c in chats))
    return into


def config(base: Path, data: Path, **overrides: str) -> dict:
    """A resolved config; overrides are dotted keys with "__" for the dots. A method comes first: it brings defaults."""
    given = {k.replace("__", "."): v for k, v in overrides.items()}
    first = {"method.name": given.pop("method.name")} if "method.name" in given else {"method.rank": "4"}
    keys = {
        **first,
        "model.path": str(base),
        "data.train": str(data),
        "data.valid": str(data),
        "data.length": "64",
        "optimizer.learning_rate": "0.01",
        "train.steps": "6",
        "train.batch_size": "8",
        "train.eval_every": "2",
        "train.save_every": "2",
        "train.tensorboard": "False",
        "mesh.fsdp": "1",
        "mesh.data": "1",
        **given,
    }
    return recipe.load("default", list(keys.items())).to_dict()
