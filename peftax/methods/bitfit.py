"""BitFit: train the biases and nothing else (Ben Zaken et al., 2021).

  y  = x W + b,   b trainable          W' = W, b' = b

  bias : [out]  trainable, pretrained values

Identity at init. Trainable per site: out.
Learning rate: 3e-4 to 2e-3 (LoRA paper, appendix D, GPT-3: 1.6e-3; T-Few: 3e-4).
Source: https://arxiv.org/abs/2106.10199, section 3.
Departs: nothing; a model without biases (Llama) has nothing to train and raises. Hugging Face PEFT has no such
type; the result is saved as whole tensors. What PEFT reads is lora with bias="all".
"""

from __future__ import annotations

from collections.abc import Sequence

from peftax.core import lift
from peftax.core.method import Method
from peftax.core.targets import named


def bitfit(
    *,
    targets: str | Sequence[str] = ".*",  # regex over whole names | names and suffixes, of modules whose biases train
) -> Method:
    """Biases of the matching modules."""
    config = dict(locals())

    def chosen(name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        return leaf == "bias" and named(targets, module)

    return lift.select("bitfit", chosen, config=config)
