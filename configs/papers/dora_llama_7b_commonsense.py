"""DoRA of LLaMA-7B on Commonsense-170k, 78.4% on eight tasks (Liu et al., 2024, table 1,
https://arxiv.org/abs/2402.09353).

Source: commonsense_reasoning/ of NVlabs/DoRA: README (rank 32, 1e-4) and finetune.py, whose loss is on the instruction
too, as here. `data.train` is ft-training_set/commonsense_170k.json of AGI-Edgerunners/LLM-Adapters, to be fetched
first: instruction, input, output.
Differs: bf16 in place of fp16; the prompt is Alpaca's without the script's indentation; 120 rows are not kept apart.
"""

import ml_collections
from peftax.configs import default
from peftax.configs.papers import INSTRUCTION

STEPS = 3 * 10_651  # epochs of 170,420 rows, 16 a step


def get_config() -> ml_collections.ConfigDict:
    config = default.get_config()
    config.model.path = "huggyllama/llama-7b"
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "bfloat16"
    config.model.remat = "full"
    config.method = {
        "name": "dora",
        "rank": 32,
        "alpha": 64.0,
        "dropout": 0.05,
        "targets": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    }
    config.data.train = "commonsense_170k.json"
    config.data.prompt = "<s>"
    config.data.completion = INSTRUCTION % "instruction" + "\n{output}</s>"
    config.data.length = 256
    config.data.policy = "truncate"
    config.data.packing = False
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 100
    config.train.steps = STEPS
    config.train.batch_size = 16
    config.train.save_every = 1000
    return config
