"""Guanaco-13B: QLoRA of LLaMA-13B on OASST1; see guanaco_7b.

Variants: "paper" has dropout 0.1 (Dettmers et al., 2023, appendix B, for 7B and 13B; second hand), "repo" 0.05
(scripts/finetune_guanaco_13b.sh of artidoro/qlora).
"""

import ml_collections
from peftax.configs.papers import guanaco_7b

VARIANTS = ("paper", "repo")


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    dropout = {"paper": 0.1, "repo": 0.05}[variant]
    return guanaco_7b.guanaco("huggyllama/llama-13b", learning_rate=2e-4, dropout=dropout)
