"""One layer's part of a leaf as a tensor of an adapter folder: its name, and how it is turned."""

from __future__ import annotations

import numpy as np

from peftax.core import hf
from peftax.core.adapters import Slot
from peftax.core.method import Method

PREFIX = "base_model.model."


def key(slot: Slot, piece: Method, form: hf.Format | None) -> str | None:
    """The tensor that holds this slot; None where a PEFT folder holds none of its own."""
    if form is None:
        return ".".join(filter(None, (slot.name, piece.name, slot.leaf)))
    if slot.kind == "shared":
        return form.shared.get(slot.leaf)
    if slot.window and not form.takes(slot.window):
        return None
    suffix = form.keys.get(slot.kind, {}).get(slot.leaf)
    return suffix and f"{PREFIX}{slot.name}.{suffix}"


def to_file(value: np.ndarray, slot: Slot, piece: Method, form: hf.Format | None) -> np.ndarray:
    """A leaf as the file has it."""
    if form is not None and slot.window and slot.leaf in form.windows:
        return hf.to_window(value, piece.axes[slot.leaf], slot.window)
    if form is not None and slot.window and slot.leaf in form.patches:
        value = hf.to_patches(value, piece.axes[slot.leaf], slot.window)
    return value if form is None or slot.leaf in form.straight or value.ndim != 2 else value.T


def from_file(tensor: np.ndarray, slot: Slot, piece: Method, form: hf.Format | None) -> np.ndarray:
    """Its inverse."""
    if form is not None and slot.window and slot.leaf in form.windows:
        return hf.from_window(tensor, piece.axes[slot.leaf], slot.window)
    value = tensor if form is None or slot.leaf in form.straight or tensor.ndim != 2 else tensor.T
    if form is not None and slot.window and slot.leaf in form.patches:
        value = hf.from_patches(value, piece.axes[slot.leaf], slot.window)
    return value
