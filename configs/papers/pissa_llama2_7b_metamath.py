"""PiSSA of Llama-2-7B on 100,000 rows of MetaMathQA (Meng et al., 2024, https://arxiv.org/abs/2404.02948, section 5.1).

Source: scripts/metamath_llama2_7b/run_pissa.sh and train.py of GraphPKU/PiSSA.
Variants: "paper" starts from the whole SVD, "repo" from the fast one, as the script does with 16 iterations (here 4,
each orthonormalized).
Differs: the script's copy of the data set (fxmeng/pissa-dataset) names its columns instruction and output.
"""

import ml_collections
from peftax.configs import default
from peftax.configs.papers import INSTRUCTION

VARIANTS = ("paper", "repo")
STEPS = 781  # one epoch, 128 rows a step


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    config = default.get_config()
    config.model.path = "meta-llama/Llama-2-7b-hf"
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "bfloat16"
    config.model.remat = "full"
    start = {"paper": "pissa", "repo": "pissa_fast"}[variant]
    config.method = {"name": "lora", "rank": 128, "alpha": 128.0, "init": start, "targets": "all-linear"}
    config.data.train = "meta-math/MetaMathQA"
    config.data.train_split = "train[:100000]"
    config.data.prompt = "<s>" + INSTRUCTION % "query"
    config.data.completion = "{response}\n</s>"
    config.data.length = 512
    config.data.policy = "truncate"
    config.data.packing = False
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 24  # 3%
    config.train.steps = STEPS
    config.train.batch_size = 4
    config.train.accumulate = 32
    config.train.save_every = 100
    return config
