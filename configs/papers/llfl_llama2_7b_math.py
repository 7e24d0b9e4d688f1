"""LoRA of Llama-2-7B on MetaMathQA ("LoRA Learns Less and Forgets Less", Biderman et al., 2024, https://arxiv.org/abs/2405.09673).

Source: the paper's appendix, instruction fine-tuning on math, rank 64: Lion, 768 rows of 1024 tokens a step, cosine
down to 1%, 10% warmup, alpha twice the rank; here 4 of the paper's 1, 2, 4, 8 and 16 epochs.
Differs: the prompt is Alpaca's, of which we did not read what the authors took. Rank 256 takes 5e-5.
"""

import ml_collections
from peftax.configs import default
from peftax.configs.papers import INSTRUCTION


def get_config() -> ml_collections.ConfigDict:
    config = learns_less(query="query", response="response", steps=4 * 514)  # 395,000 rows
    config.data.train = "meta-math/MetaMathQA"
    config.data.length = 1024
    config.optimizer.learning_rate = 1e-4
    config.train.batch_size = 8
    config.train.accumulate = 96
    return config


def learns_less(*, query: str, response: str, steps: int) -> ml_collections.ConfigDict:
    """What math and code share, by the columns of their data."""
    config = default.get_config()
    config.model.path = "meta-llama/Llama-2-7b-hf"
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "bfloat16"
    config.model.remat = "full"
    config.method = {"name": "lora", "rank": 64, "alpha": 128.0, "targets": "all-linear"}
    config.data.prompt = "<s>" + INSTRUCTION % query
    config.data.completion = "\n{" + response + "}</s>"
    config.data.policy = "truncate"
    config.data.packing = False
    config.optimizer.name = "lion"
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.warmup_steps = steps // 10
    config.optimizer.final_fraction = 0.01
    config.train.steps = steps
    config.train.save_every = 100
    return config
