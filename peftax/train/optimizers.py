"""Optimizers and schedules by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

from peftax.core.method import Method


def from_config(
    config: Mapping[str, Any], *, steps: int, method: Method
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(optimizer, its learning rate by step) of a config's optimizer section, as the method wants it."""
    o = dict(config)
    rate = schedule(
        name=o.pop("schedule"),
        learning_rate=o.pop("learning_rate"),
        steps=steps,
        warmup_steps=o.pop("warmup_steps"),
        final_fraction=o.pop("final_fraction"),
    )
    optimizer = make(schedule=rate, **o)
    return optimizer if method.wrap is None else method.wrap(optimizer, steps), rate


def schedule(
    *,
    name: str = "cosine",
    learning_rate: float = 1e-3,
    steps: int,
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
) -> optax.Schedule:
    """Linear warmup to `learning_rate`, then "cosine" or "linear" down to final_fraction of it, or "constant"."""
    rest = max(1, steps - warmup_steps)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest, alpha=final_fraction),
        "linear": lambda: optax.linear_schedule(learning_rate, learning_rate * final_fraction, rest),
        "constant": lambda: optax.constant_schedule(learning_rate),
    }
    if name not in after:
        raise ValueError(f"optimizer.schedule {name!r} is none of {', '.join(after)}")
    if not warmup_steps:
        return after[name]()
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after[name]()], [warmup_steps])


def make(
    *,
    name: str = "adamw",
    schedule: optax.Schedule,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """ "adamw" | "adam" | "sgd" behind clipping of the global norm (None: no clipping)."""
    rules = {
        "adamw": lambda: optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
        "adam": lambda: optax.adam(schedule, b1=b1, b2=b2, eps=eps),
        "sgd": lambda: optax.sgd(schedule),
    }
    if name not in rules:
        raise ValueError(f"optimizer.name {name!r} is none of {', '.join(rules)}")
    return optax.chain(optax.clip_by_global_norm(clip) if clip else optax.identity(), rules[name]())
