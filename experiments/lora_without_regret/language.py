"""SmolLM2-135M-Instruct on function calling."""

import ml_collections
from peftax.configs import smollm2_lora

from experiments.lora_without_regret import arms

STEPS, ROWS = 40, 1
ATTENTION = r".*self_attn\.(q|k|v|o)_proj"  # 3,840 numbers a rank and layer
MLP = r".*mlp\.(gate|up|down)_proj"  # 6,336

TOGETHER = 4  # members in one program: of full fine-tuning, 2 GiB each


def get_config() -> ml_collections.ConfigDict:
    config = arms.without_schedule(smollm2_lora.get_config(), steps=STEPS, rows=ROWS)
    config.data.train_length = 256
    config.data.valid_limit = 24
    config.data.test_limit = 50
    config.train.tensorboard = False
    return config


def sweep(add):
    rates = {"lora": (1e-4, 4e-4, 1.6e-3, 6.4e-3), "full": (1e-5, 4e-5, 1.6e-4, 6.4e-4)}
    arms.add_methods(add, ranks=(1, 16, 128), places={ATTENTION: 33, MLP: 20}, **rates)
