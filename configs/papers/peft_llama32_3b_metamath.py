"""LoRA of Llama-3.2-3B on MetaMathQA: the run of Hugging Face PEFT's method comparison, 47.8% on GSM8K.

Source: method_comparison/MetaMathQA of huggingface/peft: default_training_params.json, data.py and run.py, whose loss
is on the question too, as here; the LoRA of rank 32. Other methods: --config.method.name=..., as in its `experiments`.
Differs: rows longer than 768 tokens are left out by their tokens, there by 1300 characters; the batches are not of
like lengths; no valid and test rows are kept apart.
"""

import ml_collections
from peftax.configs import default


def get_config() -> ml_collections.ConfigDict:
    config = default.get_config()
    config.model.path = "meta-llama/Llama-3.2-3B"
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "bfloat16"
    config.method = {"name": "lora", "rank": 32, "alpha": 64.0, "targets": ("q_proj", "v_proj")}
    config.data.train = "meta-math/MetaMathQA"
    config.data.prompt = "<|begin_of_text|>"
    config.data.completion = "Question: {query} Think step by step.\nAnswer:{response}<|end_of_text|>"
    config.data.length = 768
    config.data.packing = False
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 0.1
    config.train.steps = 5000
    config.train.batch_size = 4
    config.train.eval_every = 250
    config.train.save_every = 250
    return config
