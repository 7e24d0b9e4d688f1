"""Guanaco-7B: QLoRA of LLaMA-7B on OASST1 (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314, appendix B).

Source: scripts/finetune_guanaco_7b.sh and qlora.py of artidoro/qlora. The script says 3% warmup, which transformers'
"constant" schedule leaves out, so that there is none here.
Differs: AdamW lies in the device's memory, not paged; rows are shuffled, not grouped by length.
"""

import ml_collections
from peftax.configs import qlora


def get_config() -> ml_collections.ConfigDict:
    return guanaco("huggyllama/llama-7b", learning_rate=2e-4, dropout=0.1)


def guanaco(path: str, *, learning_rate: float, dropout: float) -> ml_collections.ConfigDict:
    """What the four sizes share: 16 conversations a step, 1875 steps, a loss on the whole text."""
    config = qlora.get_config(path)
    config.method = {"name": "lora", "rank": 64, "alpha": 16.0, "dropout": dropout, "targets": "all-linear"}
    config.data.train = "timdettmers/openassistant-guanaco"
    config.data.prompt = "<s>"
    config.data.completion = "{text}</s>"
    config.data.length = 513  # <s> and 512 tokens
    config.data.policy = "truncate"
    config.data.packing = False
    config.data.seed = 42
    config.optimizer.learning_rate = learning_rate
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    config.optimizer.clip = 0.3
    config.train.steps = 1875
    config.train.batch_size = 4
    config.train.accumulate = 4
    return config
