"""QLoRA on SmolLM2-135M-Instruct: the LoRA of `smollm2_lora` over linear kernels in NF4 with double quantization
(Dettmers et al., 2023).

The weights that there are of this model were quantized before (GGUF Q4_1): this shows that QLoRA trains, and says
nothing of formats against each other.
"""

import ml_collections
from peftax.configs import smollm2_lora


def get_config() -> ml_collections.ConfigDict:
    config = smollm2_lora.get_config()
    config.model.quantize = (("_proj/kernel$", {"fmt": "nf4", "group": 64, "double": True}),)
    return config
