"""Experts in one parameter: tensors of stacked kernels, which Hugging Face PEFT holds as one (`target_parameters`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from peftax.core import hf, tree
from peftax.core.adapters import Slot
from peftax.core.method import Method
from peftax.weights import forms


def _experts(slots: Iterable[Slot], piece: Method, form: hf.Format | None) -> dict[str, dict[str, list[Slot]]]:
    """{stacked parameter: {leaf: the slots of all its experts}} of those stacks that are targets whole and alike."""
    found: dict[str, dict[str, list[Slot]]] = {}
    if form is None or form.stacks is None or piece.settings is None:
        return {}
    for slot in slots:
        if slot.experts and forms.key(slot, piece, form):
            found.setdefault(slot.name.rpartition(".")[0], {}).setdefault(slot.leaf, []).append(slot)

    def alike(own: list[Slot]) -> bool:
        settings = [piece.settings(s.name, s.kind) for s in own]
        return len(own) == own[0].experts and all(s == settings[0] for s in settings)

    held = set(form.stacks.leaves)
    return {p: leaves for p, leaves in found.items() if set(leaves) == held and all(map(alike, leaves.values()))}


def _nested(parameters: Iterable[str]) -> dict[str, str]:
    """parameter -> the module in the file that holds its tensors: of one module's parameters each wraps the former."""
    holders: dict[str, list[str]] = {}
    for parameter in parameters:
        holders.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    return {
        parameter: (forms.PREFIX + holder).rstrip(".") + ".base_layer" * depth
        for holder, held in holders.items()
        for depth, parameter in enumerate(reversed(held))
    }


def stack(
    tensors: dict[str, np.ndarray], slots: Iterable[Slot], piece: Method, form: hf.Format | None
) -> dict[str, str]:
    """Put experts' tensors together, in place; {parameter: one of its experts' names}."""
    slots = list(slots)
    experts = _experts(slots, piece, form)
    alone = [s.name for s in slots if s.experts and s.name.rpartition(".")[0] not in experts]
    if alone:
        logging.warning(
            "%s: %r stands for itself, since its stack's experts are not all adapted alike; Hugging Face PEFT does not "
            "read it",
            piece.name,
            alone[0],
        )
    modules = _nested(experts)
    for parameter, leaves in experts.items():
        held = {
            leaf: np.stack([forms.from_file(tensors.pop(forms.key(s, piece, form)), s, piece, form) for s in own])
            for leaf, own in leaves.items()
        }
        tensors |= {f"{modules[parameter]}.{end}": value for end, value in form.stacks.pack(held).items()}
    return {parameter: next(iter(leaves.values()))[0].name for parameter, leaves in experts.items()}


def unstacked(
    tensors: Mapping[str, np.ndarray],
    slots: Iterable[Slot],
    piece: Method,
    form: hf.Format | None,
    config: Mapping[str, Any],
    folder: Path,
) -> dict[str, np.ndarray]:
    """The file's tensors with those of stacked experts one by one."""
    tensors, experts = dict(tensors), _experts(slots, piece, form)
    found = {  # what is written one by one stays
        module: experts[parameter]
        for parameter, module in _nested(experts).items()
        if not any(forms.key(s, piece, form) in tensors for own in experts[parameter].values() for s in own)
    }
    held, shapes = [], []
    for module, leaves in found.items():
        zeros = {leaf: np.zeros((len(own), *own[0].shape), np.float32) for leaf, own in leaves.items()}
        keys = {end: f"{module}.{end}" for end in form.stacks.pack(zeros)}
        if missing := [key for key in keys.values() if key not in tensors]:
            near = tree.nearest(missing[0], tensors, 1)
            raise ValueError(f"{folder}: holds no tensor {missing[0]!r}; the nearest: {near}")
        held.append({end: tensors.pop(key) for end, key in keys.items()})
        shapes.append({leaf: value.shape for leaf, value in zeros.items()})
    if found:
        unpacked = form.stacks.unpack(held, shapes, config)
        for leaves, values in zip(found.values(), unpacked, strict=True):
            for leaf, own in leaves.items():
                tensors |= {
                    forms.key(s, piece, form): forms.to_file(v, s, piece, form)
                    for s, v in zip(own, values[leaf], strict=True)
                }
    return tensors
