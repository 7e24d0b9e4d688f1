"""LoRA of Llama-2-7B on Magicoder-Evol-Instruct-110K ("LoRA Learns Less and Forgets Less"); see llfl_llama2_7b_math.

Source: the paper's appendix, instruction fine-tuning on code, rank 64: 192 rows of 4096 tokens a step. Rank 256 takes
1e-4.
"""

import ml_collections
from peftax.configs.papers import llfl_llama2_7b_math


def get_config() -> ml_collections.ConfigDict:
    config = llfl_llama2_7b_math.learns_less(query="instruction", response="response", steps=4 * 579)  # 111,183 rows
    config.data.train = "ise-uiuc/Magicoder-Evol-Instruct-110K"
    config.data.length = 4096
    config.optimizer.learning_rate = 2e-4
    config.train.batch_size = 4
    config.train.accumulate = 48
    return config
