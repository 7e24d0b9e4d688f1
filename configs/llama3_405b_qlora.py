"""QLoRA on Llama-3.1-405B. `peftax plan --config=llama3_405b_qlora --topology=MACHINE` says whether it fits."""

import ml_collections
from peftax.configs import qlora

MACHINES = {
    "h100:8": qlora.rows(8, 2),
    "v5p-64": qlora.rows(32, 1),
    "v6e-256": qlora.rows(256, 1),
}


def get_config() -> ml_collections.ConfigDict:
    return qlora.get_config("meta-llama/Llama-3.1-405B")
