"""What the recipes of large models share: QLoRA in bf16 on all linear layers (Dettmers et al., 2023), data to be named.

The rows of a batch lie over all devices of `data` and `fsdp`, so that a machine's batch is a multiple of those.
"""

import ml_collections
from peftax.configs import default

NF4 = (("_proj/kernel$", {"fmt": "nf4", "group": 64, "double": True}),)


def get_config(path: str) -> ml_collections.ConfigDict:
    config = default.get_config()
    config.model.path = path
    config.model.quantize = NF4
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "bfloat16"
    config.model.remat = "full"
    config.method = {"name": "lora", "rank": 16, "alpha": 32.0, "targets": "all-linear"}
    config.data.length = 2048
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 30
    config.train.steps = 1000
    config.train.batch_size = 1
    config.train.accumulate = 16
    config.train.eval_every = 100
    config.train.save_every = 100
    return config


def rows(batch: int, accumulate: int, **mesh: int) -> tuple[tuple[str, str], ...]:
    """The pairs of a machine: rows of a batch, parts of a step, and how its devices share."""
    pairs = [("train.batch_size", str(batch)), ("train.accumulate", str(accumulate))]
    return (*pairs, *((f"mesh.{axis}", str(n)) for axis, n in mesh.items()))
