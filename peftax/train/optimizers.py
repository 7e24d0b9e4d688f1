"""Optimizers and schedules by name."""

from __future__ import annotations

import functools
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from peftax.core import tree
from peftax.core.method import Method
from peftax.core.sites import Sites

Factors = Mapping[str, float] | Sequence[tuple[str, float]]
DECAYING = ("adamw", "lion", "lora_fa")  # optimizers that know weight decay
NUMBERS = ("learning_rate", "warmup_steps", "final_fraction", "weight_decay", "eps", "clip", "b1", "b2")


def from_config(
    config: Mapping[str, Any], *, steps: int, method: Method, sites: Sites
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(optimizer, its learning rate by step) of a config's optimizer section, as the method wants it.

    Raises ValueError where a number cannot be what its key says.
    """
    o = dict(config)
    _check_numbers(o)
    rate = schedule(
        name=o.pop("schedule"),
        learning_rate=o.pop("learning_rate"),
        steps=steps,
        warmup_steps=o.pop("warmup_steps"),
        final_fraction=o.pop("final_fraction"),
    )
    optimizer = make(schedule=rate, **o)
    return optimizer if method.wrap is None else method.wrap(optimizer, steps, sites), rate


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
    no_decay: Sequence[str] = (),
    factors: Factors = (),
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """ "adamw" | "adam" | "lion" | "sgd" | "lora_fa", behind clipping of the global norm (None: no clipping).

    Args:
      no_decay: regexes found in the paths of leaves that weight decay passes by.
      factors: ((regex found in a leaf's path, factor of its learning rate), ...); the first match wins.
    """
    decayed = functools.partial(_decayed, patterns=tuple(no_decay))
    rules = {
        "adamw": lambda: optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed),
        "adam": lambda: optax.adam(schedule, b1=b1, b2=b2, eps=eps),
        "lion": lambda: optax.lion(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed),
        "sgd": lambda: optax.sgd(schedule),
        "lora_fa": lambda: lora_fa(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed),
    }
    if name not in rules:
        raise ValueError(f"optimizer.name {name!r} is none of {', '.join(rules)}")
    for key, value in (("weight_decay", weight_decay), ("no_decay", no_decay)):
        if value and name not in DECAYING:
            raise ValueError(f"optimizer.{key}={value!r}: {name} knows no weight decay; {', '.join(DECAYING)} do")
    clipping = optax.clip_by_global_norm(clip) if clip else optax.identity()
    return optax.chain(clipping, rules[name](), *([scale_by_path(factors)] if factors else []))


# --- leaves by path -------------------------------------------------------------------------------


def scale_by_path(factors: Factors) -> optax.GradientTransformation:
    """Updates times the factor of the first regex that is found in their leaf's path.

    Behind a whole rule it is another learning rate there, decay included: LoRA+ (https://arxiv.org/abs/2402.12354)
    is {"/lora/.*/b$": 16}.
    """
    pairs = tuple(factors.items()) if isinstance(factors, Mapping) else tuple(tuple(pair) for pair in factors)

    def factor(path: str) -> float:
        return next((f for pattern, f in pairs if re.search(pattern, path)), 1.0)

    def init(params) -> optax.EmptyState:
        _check("factors", [pattern for pattern, _ in pairs], tree.flatten(params))
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params
        scaled = {path: u if factor(path) == 1 else factor(path) * u for path, u in tree.flatten(updates).items()}
        return tree.unflatten(scaled), state

    return optax.GradientTransformation(init, update)


def _decayed(params, *, patterns: Sequence[str]) -> Any:
    """Which leaves weight decay acts on."""
    flat = tree.flatten(params)
    _check("no_decay", patterns, flat)
    return tree.unflatten({path: not any(re.search(p, path) for p in patterns) for path in flat})


def _check_numbers(o: Mapping[str, Any]) -> None:
    for key in (key for key in NUMBERS if key in o):
        value, below = o[key], 1 if key in ("b1", "b2") else math.inf
        if (key == "clip" and value is None) or isinstance(value, jax.Array):  # a population's rate is traced
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value < below:
            want = "a number of 0 or more" + (f", below {below:g}" if below < math.inf else "")
            raise ValueError(f"config.optimizer.{key}={value!r}: want {want}")
    for key in ("no_decay", "factors"):
        if isinstance(o.get(key), str):
            raise ValueError(f"config.optimizer.{key}={o[key]!r}: want several in brackets, a comma behind each")
    factors = o.get("factors", ())
    for pair in factors.items() if isinstance(factors, Mapping) else factors:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[1], numbers.Real):
            raise ValueError(f"config.optimizer.factors: {pair!r} is no (regex, factor); want (('/lora/.*/b$', 16.0),)")


def _check(key: str, patterns: Sequence[str], paths: Mapping[str, Any]) -> None:
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            near = tree.nearest(pattern, paths)
            raise ValueError(f"optimizer.{key}: {pattern!r} is found in no trainable leaf's path; the nearest: {near}")


# --- LoRA-FA --------------------------------------------------------------------------------------


class Moments(NamedTuple):
    step: jax.Array
    mean: Any
    square: Any


def lora_fa(
    schedule: optax.Schedule, *, b1: float, b2: float, eps: float, weight_decay: float, mask: Any
) -> optax.GradientTransformationExtraArgs:
    """AdamW on B's gradient as it stands for the whole update's, where A is frozen (Zhang et al., 2023).

      g <- (Aᵀ A + 1e-8)⁻¹ g / s²                        of each `b` beside a frozen `a` and `scale`
      u = -η_t sqrt(1 - b2^t) / (1 - b1^t) · m / (sqrt(v) + eps),   then -η_t weight_decay (p + u) more

    As Hugging Face PEFT's LoraFAOptimizer: eps stands beside a square root that is not corrected, and decay comes
    after the update. Source: https://arxiv.org/abs/2308.03303; the projection: https://arxiv.org/abs/2407.18242.
    Departs: PEFT multiplies by the inverse in bf16 where the machine has it; here it is f32.
    """

    def init(params) -> Moments:
        flat = tree.flatten(params)
        a = next((path for path in flat if path.endswith("/a") and "/lora/" in path), None)
        if a is not None:
            raise ValueError(f"optimizer lora_fa: {a!r} would train; set config.method.freeze_a=True")
        if not any(path.endswith("/b") and "/lora/" in path for path in flat):
            raise ValueError("optimizer lora_fa: no trainable leaf is LoRA's b; the nearest is adamw")
        return Moments(jnp.int32(0), jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    def project(path: str, g: jax.Array, frozen: Mapping[str, jax.Array]) -> jax.Array:
        place, _, leaf = path.rpartition("/")
        if leaf != "b" or "/lora/" not in path:
            return g
        a, scale = frozen[f"{place}/a"], frozen[f"{place}/scale"][..., None, None]
        gram = jnp.einsum("...ir,...is->...rs", a, a)
        gram += 1e-8 * jnp.broadcast_to(jnp.eye(a.shape[-1]), gram.shape)
        return jnp.linalg.solve(gram, g) / jnp.square(scale)

    def update(grads, state: Moments, params=None, *, frozen, **more):
        del more
        held = tree.flatten(frozen)
        grads = tree.unflatten({path: project(path, g, held) for path, g in tree.flatten(grads).items()})
        step = state.step + 1
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, grads)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.square, grads)
        rate = schedule(state.step)
        size = rate * jnp.sqrt(1 - b2**step) / (1 - b1**step)

        def change(m, v, p, decays):
            u = -size * m / (jnp.sqrt(v) + eps)
            return u - rate * weight_decay * (p + u) if decays else u

        return jax.tree.map(change, mean, square, params, mask(params)), Moments(step, mean, square)

    return optax.GradientTransformationExtraArgs(init, update)
