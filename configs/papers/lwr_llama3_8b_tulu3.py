"""LoRA of Llama-3.1-8B on Tulu 3's conversations (Schulman et al., 2025, "LoRA Without Regret", supervised part).

Source: the text for alpha 32 at every rank, LoRA on all linear layers and the unembedding, and a constant learning
rate that is swept; thinking-machines-lab/tinker-cookbook for its sweep (128 conversations a step, 780 steps), Adam's
betas and the conversation's form.
Variants: "paper" goes through the data once (939,343 rows; the text does not say how many a step: the cookbook's 128),
"repo" makes the cookbook's 780 steps.
Differs: a row's length, which neither says, is ours.
"""

import ml_collections
from peftax.configs import default

VARIANTS = ("paper", "repo")
CONVERSATION = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'].title() + ':' }}"
    "{{ ' ' + m['content'] }}{{ '<|end_of_text|>' if m['role'] == 'assistant' else '' }}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    config = default.get_config()
    config.model.path = "meta-llama/Llama-3.1-8B"
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "bfloat16"
    config.model.remat = "full"
    linear = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    config.method = {"name": "lora", "rank": 128, "alpha": 32.0, "targets": (*linear, "lm_head")}
    config.data.train = "allenai/tulu-3-sft-mixture"
    config.data.chat_template = CONVERSATION
    config.data.length = 4096
    config.data.policy = "truncate"
    config.data.packing = False
    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule = "constant"
    config.optimizer.b2 = 0.95
    config.optimizer.clip = None
    config.train.steps = {"paper": 7338, "repo": 780}[variant]
    config.train.batch_size = 4
    config.train.accumulate = 32
    return config


def sweep(add) -> None:
    """The cookbook's grid."""
    for rank in (4, 16, 64, 128):
        for rate in (4e-5, 1e-4, 3e-4, 1e-3, 3e-3):
            add({"method.rank": rank, "optimizer.learning_rate": rate})
