"""What is compared, on any base: ranks, places, full fine-tuning; and batches of three sizes that see as many rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

Add = Callable[[Mapping[str, Any]], None]
RATE = "optimizer.learning_rate"
ALPHA = 32.0  # at every rank, so that the scale is 32 / rank
RANK = 16  # of the batches
SEEDS = (1, 2)  # of what is chosen, beside 0
FACTOR = 4  # between two sizes of a batch
FULL = {"method.name": "full"}


def without_schedule(config: ml_collections.ConfigDict, *, steps: int, rows: int) -> ml_collections.ConfigDict:
    """A constant learning rate, and one look at valid, at the end."""
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    config.train.batch_size = rows
    config.train.steps = steps
    config.train.eval_every = config.train.save_every = steps * FACTOR
    return config


def add_methods(
    add: Add, *, ranks: Sequence[int], places: Mapping[str, int], lora: Sequence[float], full: Sequence[float]
) -> None:
    """LoRA of these ranks on all linear layers and of {targets: rank}, and full fine-tuning, each at its rates."""
    for rank in ranks:
        _add(add, lora_of(rank), lora)
    for where, rank in places.items():
        _add(add, {**lora_of(rank), "method.targets": where}, lora)
    _add(add, FULL, full)


def add_batches(add: Add, *, steps: int, rows: int, lora: Sequence[float], full: Sequence[float]) -> None:
    """LoRA of RANK and full fine-tuning in batches smaller and larger than `rows`, which see as many rows."""
    for size in (1 / FACTOR, FACTOR):
        batch = {"train.batch_size": int(rows * size), "train.steps": int(steps / size)}
        _add(add, {**lora_of(RANK), **batch}, lora)
        _add(add, {**FULL, **batch}, full)


def lora_of(rank: int) -> dict[str, Any]:
    return {"method.name": "lora", "method.rank": rank, "method.alpha": ALPHA}


def _add(add: Add, arm: Mapping[str, Any], rates: Sequence[float]) -> None:
    for rate in rates:
        add({**arm, RATE: rate})
