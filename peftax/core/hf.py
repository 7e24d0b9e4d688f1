"""How a method's leaves and settings stand in a Hugging Face PEFT adapter folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from peftax.core.targets import by_pattern

# {Hugging Face module name ("" for what all share): {leaf: one layer's array}}
Layers = dict[str, dict[str, np.ndarray]]


BARE = "base_model."  # the root of a base that PEFT leaves as it is
BY_NAME = "by name"  # in place of target_modules: the whole names of all targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stacks:
    """How one parameter that stacks the kernels of many experts stands in a file (PEFT's `target_parameters`).

    leaves: the leaves that it holds; experts with others are written one by one.
    pack:   leaves of all experts [E, ...] -> {suffix: tensor}.
    unpack: ([{suffix: tensor}] and [leaf -> shape [E, ...]] of all stacks, adapter_config.json) -> [leaves [E, ...]].
    settle: (keyword arguments, {parameter: the Hugging Face name of one of its experts}) -> keyword arguments that
            say the same by parameters.
    since:  the version of PEFT whose files are as `pack` makes them.
    """

    leaves: tuple[str, ...]
    pack: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    unpack: Callable[..., list[dict[str, np.ndarray]]]
    settle: Callable[[Mapping[str, Any], Mapping[str, str]], dict[str, Any]]
    since: str


def version(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Major and minor number of the PEFT that wrote an adapter_config.json; zeros where it does not say."""
    return tuple(int(n) for n in re.findall(r"\d+", str(config.get("peft_version") or "0.0"))[:2])


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
    root:      what stands before a module's name where the base's leaves train beside; shorter of virtual tokens, since
               PEFT puts no model of its own around the base then.
    inside:    what stands between a module's name and its leaf's where the base's leaves are the method's own.
    matches:   does this config belong here? Types that several files share are told apart by it.
    shared:    leaf that all sites share -> its tensor's whole name.
    settle:    (layers, keyword arguments) -> both as an adapter of the untouched base, where the method moves it.
    pack:      (layers, keyword arguments) -> {tensor name: array}, where leaves are not tensors one by one.
    unpack:    its inverse: (tensors, layers with shapes in place of arrays, keyword arguments) -> layers.
    held:      keyword arguments of what trained -> of what its folder holds, where that is less (P-tuning's network).
    opened:    (the file's tensors, keyword arguments) -> tensors as `keys` names them, where a file may differ.
    closed:    its inverse: tensors as `keys` names them -> the file's.
    check:     (leaf, one layer's numbers as the file has them, (in, out) of its kernel) -> None; raises ValueError
               where numbers of that shape can be wrong, such as places of a kernel.
    windows:   leaves of a convolution that stand in the file as kernels of its kind: [in, r] as (r, channels, *window),
               [r, out] as (out, r, 1, ...), [out] and [1, out] as (1, out, 1, ...).
    patches:   leaves of a convolution whose inputs the file numbers (channels, *window), where here it is the reverse.
    takes:     does PEFT's type have a convolution of this window? Others get no file.
    stacks:    the form of stacked experts; without it each expert has tensors of its own, which only peftax reads.
    """

    peft_type: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Mapping[str, Any]], dict[str, Any]]
    keys: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    straight: Sequence[str] = ()
    root: str = "base_model.model."
    inside: str = ""
    matches: Callable[[Mapping[str, Any]], bool] = lambda config: True
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settle: Callable[[Layers, Mapping[str, Any]], tuple[Layers, Mapping[str, Any]]] | None = None
    pack: Callable[[Layers, Mapping[str, Any]], dict[str, np.ndarray]] | None = None
    unpack: Callable[..., Layers] | None = None
    held: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    opened: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], dict[str, np.ndarray]] | None = None
    closed: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], dict[str, np.ndarray]] | None = None
    check: Callable[[str, np.ndarray, tuple[int, int]], None] | None = None
    windows: tuple[str, ...] = ()
    patches: tuple[str, ...] = ()
    takes: Callable[[tuple[int, ...]], bool] = lambda window: True
    stacks: Stacks | None = None


def read_targets(config: Mapping[str, Any]) -> dict[str, Any]:
    """Which modules, as most PEFT types say it."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    layers = None if layers == [] else layers
    if layers is not None and config.get("layers_pattern"):
        targets, layers = _numbered(config["layers_pattern"], layers, targets), None
    return {
        "targets": targets,
        "exclude": config.get("exclude_modules"),
        "layers": layers,
        "modules_to_save": tuple(config.get("modules_to_save") or ()),
    }


def _numbered(stacks: Any, numbers: Any, targets: Any) -> str:
    """A regex for these suffixes below these numbers of these stacks (`layers_pattern`)."""
    stacks, numbers, targets = ([x] if isinstance(x, str | int) else list(x) for x in (stacks, numbers, targets))
    where = rf"(?:.*\.)?(?:{'|'.join(stacks)})\.(?:{'|'.join(map(str, numbers))})\."
    return rf"{where}(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})"


def write_targets(config: Mapping[str, Any], *, known: tuple[str, ...] = ("exclude", "layers")) -> dict[str, Any]:
    """The inverse; known: which choices this PEFT type's config has. Others are spelled out as names."""
    spelled = any(config[key] is not None for key in {"exclude", "layers"} - set(known))
    fields = {
        "exclude_modules": config["exclude"],
        "layers_to_transform": config["layers"],
        "layers_pattern": None,  # a number is the first of its name
    }
    if spelled:
        fields = dict.fromkeys(fields)
    return {
        "target_modules": BY_NAME if spelled else config["targets"],
        **{f: value for f, value in fields.items() if f.split("_")[0] in known},
        "modules_to_save": list(config["modules_to_save"] or ()) or None,
        "fan_in_fan_out": False,  # how torch lays out the base; the adapter's tensors are the same
    }


def refuse(config: Mapping[str, Any], fields: Mapping[str, str], instead: str) -> None:
    """Raise Unsupported for the first of these fields that is set; fields: name -> what it asks for."""
    for field, what in fields.items():
        if config.get(field):
            kind = config["peft_type"]
            raise Unsupported(f"{kind} with {field} ({what}) is not supported; the nearest is {instead}")


def to_window(x: np.ndarray, axes: tuple[str, ...], window: tuple[int, ...]) -> np.ndarray:
    """A convolution's leaf, one of Format's `windows`, as PEFT's tensor; inputs here are (*window, channels)."""
    n = len(window)
    if axes[0] == "in":
        return x.reshape(*window, -1, x.shape[1]).transpose(n + 1, n, *range(n))
    return x.T.reshape(*x.T.shape, *(1,) * n) if axes[0] == "rank" else x.reshape(1, -1, *(1,) * n)


def from_window(x: np.ndarray, axes: tuple[str, ...], window: tuple[int, ...]) -> np.ndarray:
    """Its inverse."""
    n = len(window)
    if axes[0] == "in":
        return x.transpose(*range(2, n + 2), 1, 0).reshape(-1, x.shape[0])
    return x.reshape(x.shape[:2]).T if axes[0] == "rank" else x.reshape(x.shape[: len(axes)] if axes[1:] else -1)


def to_patches(x: np.ndarray, axes: tuple[str, ...], window: tuple[int, ...]) -> np.ndarray:
    """A leaf with its inputs (*window, channels) in PEFT's order, (channels, *window); still one axis."""
    at = axes.index("in")
    parts = np.moveaxis(x, at, -1)
    turned = np.moveaxis(parts.reshape(*parts.shape[:-1], *window, -1), -1, parts.ndim - 1)
    return np.moveaxis(turned.reshape(parts.shape), -1, at)


def from_patches(x: np.ndarray, axes: tuple[str, ...], window: tuple[int, ...]) -> np.ndarray:
    """Its inverse."""
    at = axes.index("in")
    parts = np.moveaxis(x, at, -1)
    turned = np.moveaxis(parts.reshape(*parts.shape[:-1], -1, *window), parts.ndim - 1, -1)
    return np.moveaxis(turned.reshape(parts.shape), -1, at)


def in_any_order(patterns: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """{pattern: value}, of which the first that matches counts, spelled out by name where the order matters.

    A file sorts its fields, so that another pattern might come first there.
    """
    names, in_file = list(names), dict(sorted(patterns.items()))
    values = {name: by_pattern(patterns, name, None) for name in names}
    if all(by_pattern(in_file, name, None) == value for name, value in values.items()):
        return dict(patterns)
    return {re.escape(name): value for name, value in values.items() if value is not None}


# --- LORA: one type for many files ----------------------------------------------------------------

LORA_VARIANTS = {  # field of a LORA config -> what it asks for
    "use_dora": "DoRA",
    "use_bdlora": "block-diagonal factors",
    "use_qalora": "pooled inputs of a GPTQ base",
    "alora_invocation_tokens": "an adapter that begins at certain tokens",
    "arrow_config": "routing among adapters",
    "kasa_config": "a truncated base",
    "velora_config": "compressed activations",
    "monteclora_config": "sampled factors",
    "lora_bias": "a bias on B",
    "target_parameters": "parameters in place of modules",
    "trainable_token_indices": "rows of the embedding",
    "layer_replication": "layers that stand several times",
    "megatron_config": "Megatron's parallel layers",
}
LORA_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that move the base


def read_lora(config: Mapping[str, Any], *, honours: tuple[str, ...] = (), starts: tuple[str, ...] = ()) -> dict:
    """What all methods of type LORA read alike.

    honours: which of LORA_VARIANTS the method reads itself.  starts: which of LORA_STARTS it can move the base by.

    Raises Unsupported for every other.
    """
    instead = "plain " + ("dora" if "use_dora" in honours else "lora")
    refuse(config, {f: what for f, what in LORA_VARIANTS.items() if f not in honours}, instead)
    named = config.get("target_modules") or ()
    if config.get("ensure_weight_tying") and not config.get("modules_to_save") and not isinstance(named, str):
        tied = [name for name in named if name.rpartition(".")[2] in ("embed_tokens", "lm_head")]
        if tied:
            raise Unsupported(
                f"LORA with ensure_weight_tying and {tied[0]!r} as a target (factors that table and head share) is not "
                "supported; the nearest is modules_to_save"
            )
    start = str(config.get("init_lora_weights", True))
    if start not in starts and (start in LORA_STARTS or start.startswith("pissa_niter_")):
        raise Unsupported(
            f"LORA with init_lora_weights={start!r} stands on a moved base that its folder does not hold; save it "
            f"with path_initial_model_for_weight_conversion, as {instead}"
        )
    return {
        **read_targets(config),
        "rank": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "rank_stabilized": config.get("use_rslora", False),
        "dropout": config.get("lora_dropout", 0.0),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "bias": config.get("bias", "none"),
    }


def write_lora(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse."""
    return {
        **write_targets(config),
        "r": config["rank"],
        "lora_alpha": config["alpha"],
        "use_rslora": config["rank_stabilized"],
        "lora_dropout": config["dropout"],
        "rank_pattern": dict(config["rank_pattern"] or {}),
        "alpha_pattern": dict(config["alpha_pattern"] or {}),
        "bias": config["bias"],
        "init_lora_weights": True,
        "ensure_weight_tying": False,  # true where a trained table is shared
    }
