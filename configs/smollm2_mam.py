"""MAM adapter on SmolLM2-135M-Instruct for function calling: a prefix in attention, a scaled adapter beside the
feed-forward (He et al., 2022, https://arxiv.org/abs/2110.04366, section 4.6).

The paper's prefix has 30 tokens behind a network and its bottleneck 512; here the network is left out, the prefix
begins with a text's keys and values, and the bottleneck is as wide as a quarter of the model.
"""

import ml_collections
from peftax.configs import smollm2_lora


def get_config() -> ml_collections.ConfigDict:
    config = smollm2_lora.get_config()
    config.method = {
        "name": "prefix+adapter",
        "prefix": {"length": 30, "init": "tokens", "init_text": TEXT},
        "adapter": {"placement": "scaled_parallel", "size": 144, "activation": "relu"},
    }
    return config


TEXT = """<|im_start|>system
You are a helpful assistant. Call the function that answers the question, with the arguments that it needs, and
give the call as JSON and nothing else.<|im_end|>
"""
