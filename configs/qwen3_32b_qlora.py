"""QLoRA on Qwen3-32B. `peftax plan --config=qwen3_32b_qlora --topology=MACHINE` says whether it fits."""

import ml_collections
from peftax.configs import qlora

MACHINES = {
    "a100-80gb:1": qlora.rows(1, 16),
    "h100:8": qlora.rows(8, 2),
    "v5e-16": qlora.rows(16, 1),
    "v5p-64": qlora.rows(32, 1),
    "v6e-256": qlora.rows(256, 1),
}


def get_config() -> ml_collections.ConfigDict:
    return qlora.get_config("Qwen/Qwen3-32B")
