"""Guanaco-65B: QLoRA of LLaMA-65B on OASST1; see guanaco_7b."""

import ml_collections
from peftax.configs.papers import guanaco_7b


def get_config() -> ml_collections.ConfigDict:
    return guanaco_7b.guanaco("huggyllama/llama-65b", learning_rate=1e-4, dropout=0.05)
