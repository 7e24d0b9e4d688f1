"""How a method's leaves and settings stand in a Hugging Face PEFT adapter folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# {Hugging Face module name ("" for what all share): {leaf: one layer's array}}
Layers = dict[str, dict[str, np.ndarray]]


BY_NAME = "by name"  # in place of target_modules: the whole names of all targets


class Unsupported(ValueError):
    """The adapter asks for what this method does not do; the message says what and the nearest that is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """One method's dialect.

    peft_type: the value in adapter_config.json.
    keys:      kind of site -> leaf -> suffix of the tensor's name; a 2-D leaf is transposed in the file.
    straight:  2-D leaves that are not.
    read:      adapter_config.json -> the method's keyword arguments; raises Unsupported.
    write:     keyword arguments -> fields of adapter_config.json.
    inside:    what stands between a module's name and its leaf's where the base's leaves are the method's own.
    matches:   does this config belong here? Types that several files share are told apart by it.
    shared:    leaf that all sites share -> its tensor's whole name.
    settle:    (layers, keyword arguments) -> both as an adapter of the untouched base, where the method moves it.
    pack:      (layers, keyword arguments) -> {tensor name: array}, where leaves are not tensors one by one.
    unpack:    its inverse: (tensors, layers with shapes in place of arrays, keyword arguments) -> layers.
    held:      keyword arguments of what trained -> of what its folder holds, where that is less (P-tuning's network).
    opened:    (the file's tensors, keyword arguments) -> tensors as `keys` names them, where a file may differ.
    closed:    its inverse: tensors as `keys` names them -> the file's.
    """

    peft_type: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Mapping[str, Any]], dict[str, Any]]
    keys: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    straight: Sequence[str] = ()
    inside: str = ""
    matches: Callable[[Mapping[str, Any]], bool] = lambda config: True
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settle: Callable[[Layers, Mapping[str, Any]], tuple[Layers, Mapping[str, Any]]] | None = None
    pack: Callable[[Layers, Mapping[str, Any]], dict[str, np.ndarray]] | None = None
    unpack: Callable[..., Layers] | None = None
    held: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    opened: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], dict[str, np.ndarray]] | None = None
    closed: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], dict[str, np.ndarray]] | None = None


def read_targets(config: Mapping[str, Any]) -> dict[str, Any]:
    """Which modules, as most PEFT types say it."""
    return {
        "targets": config["target_modules"],
        "exclude": config.get("exclude_modules"),
        "layers": config.get("layers_to_transform"),
        "modules_to_save": tuple(config.get("modules_to_save") or ()),
    }


def write_targets(config: Mapping[str, Any], *, known: tuple[str, ...] = ("exclude", "layers")) -> dict[str, Any]:
    """The inverse; known: which choices this PEFT type's config has. Others are spelled out as names."""
    spelled = any(config[key] is not None for key in {"exclude", "layers"} - set(known))
    fields = {"exclude_modules": config["exclude"], "layers_to_transform": config["layers"]}
    if spelled:
        fields = dict.fromkeys(fields)
    return {
        "target_modules": BY_NAME if spelled else config["targets"],
        **{f: value for f, value in fields.items() if f.split("_")[0] in known},
        "modules_to_save": list(config["modules_to_save"] or ()) or None,
        "fan_in_fan_out": False,
    }


def refuse(config: Mapping[str, Any], fields: Mapping[str, str], instead: str) -> None:
    """Raise Unsupported for the first of these fields that is set; fields: name -> what it asks for."""
    for field, what in fields.items():
        if config.get(field):
            kind = config["peft_type"]
            raise Unsupported(f"{kind} with {field} ({what}) is not supported; the nearest is {instead}")
