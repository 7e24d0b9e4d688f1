"""Which modules a method touches, in Hugging Face's words: patterns over module names with layer numbers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

CLASSIFIERS = ("score", "classifier")  # heads of labels
OUTPUT_HEADS = ("lm_head", *CLASSIFIERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
    """A predicate over module names.

    modules: a regex that matches the whole name, or a list of names and suffixes, or "all-linear" (every
             linear module but the output head).
    exclude: the same forms; wins over modules.
    layers:  layer numbers (the first number in the name), only with a list of modules; None takes all.
    whole:   ends of names of modules that train whole instead, and are no targets; as in PEFT any end: "norm" is
             "input_layernorm" too.
    kinds:   what a list or a regex may reach.
    parameters: names and suffixes of linear kernels' parameters, targets besides: "q_proj.weight", and where one
             parameter stacks experts its own, "experts.down_proj" for "experts.down_proj.0" and all others.
             exclude and layers speak of modules, not of these.
    """

    modules: str | Sequence[str] | None
    exclude: str | Sequence[str] | None = None
    layers: int | Sequence[int] | None = None
    whole: Sequence[str] = ()
    kinds: Sequence[str] = ("linear", "conv", "embed", "head")
    parameters: Sequence[str] = ()

    def __post_init__(self):
        if not self.modules and not self.parameters:
            raise ValueError("targets: empty; give a regex, a list of module names, or 'all-linear'")
        for field, value in (("parameters", self.parameters), ("modules_to_save", self.whole)):
            if isinstance(value, str):
                raise ValueError(f"{field}: {value!r} is one string; give a list of names")
        if self.layers is not None and isinstance(self.modules, str) and self.modules != "all-linear":
            raise ValueError("layers: works with a list of targets; with a regex put the numbers into it")
        for value in (self.modules, self.exclude):
            if isinstance(value, str) and value != "all-linear":
                try:
                    re.compile(value)
                except re.error as error:
                    raise ValueError(f"targets: {value!r} is no regular expression: {error}") from None

    def match(self, name: str, kind: str) -> bool:
        if kind == "linear" and self.parameter(name) and not self.trains_whole(name):
            return True
        if not self.modules or (self.exclude and named(self.exclude, name)) or self.trains_whole(name):
            return False
        if self.modules == "all-linear":
            hit = kind == "linear" and name.rsplit(".", 1)[-1] not in OUTPUT_HEADS
        else:
            hit = kind in self.kinds and named(self.modules, name)
        if hit and self.layers is not None:
            number = layer_number(name)
            wanted = (self.layers,) if isinstance(self.layers, int) else self.layers
            hit = number is not None and number in wanted
        return hit

    def parameter(self, name: str) -> str | None:
        """The name of this linear module's parameter, where `parameters` holds it."""
        stack, _, number = name.rpartition(".")
        own = (f"{name}.weight", *([stack] if number.isdigit() else []))
        return next((p for p in own if named(tuple(self.parameters), p)), None)

    def trains_whole(self, name: str) -> bool:
        return name.endswith(tuple(self.whole))


def layer_number(name: str) -> int | None:
    """The first number among the parts of a module's name."""
    return next((int(p) for p in name.split(".") if p.isdigit()), None)


def named(pattern: str | Sequence[str], name: str) -> bool:
    """Does a regex match the whole name, or is it one of these names or suffixes?"""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in pattern)


Patterns = Mapping[str, Any] | Sequence[tuple[str, Any]] | None


def by_pattern(patterns: Patterns, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the name, else the default."""
    for pattern, value in dict(patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def low_rank(
    name: str, rank: int, alpha: float, *, rank_stabilized: bool, rank_pattern: Patterns, alpha_pattern: Patterns
) -> dict[str, Any]:
    """A LoRA's rank and scale at one name: {"rank": r, "scale": alpha / r or, rank_stabilized, alpha / sqrt(r)}."""
    r, alpha_here = by_pattern(rank_pattern, name, rank), by_pattern(alpha_pattern, name, alpha)
    return {"rank": r, "scale": alpha_here / (math.sqrt(r) if rank_stabilized else r)}
