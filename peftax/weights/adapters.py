"""Adapters in and out: Hugging Face PEFT's folder where the method has a PEFT type, the same tensors beside
our own JSON elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from peftax import methods
from peftax.core import hf, tree
from peftax.core.hf import Unsupported
from peftax.core.method import Method, Partition, parts
from peftax.core.sites import Site, Sites, real_shape, theta_of
from peftax.weights import names, source

PREFIX = "base_model.model."
PEFT_CONFIG, OWN_CONFIG, TENSORS = "adapter_config.json", "peftax_adapter.json", "adapter_model.safetensors"


def read_config(path: str | Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(method, its settings, the raw JSON) of an adapter folder or of an adapter_config.json."""
    path = Path(path)
    file = path
    if path.is_dir():
        file = path / PEFT_CONFIG if (path / PEFT_CONFIG).exists() else path / OWN_CONFIG
    try:
        raw = source.read_json(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: holds no {PEFT_CONFIG}; is it an adapter folder?") from None
    if "method" in raw and "peft_type" not in raw:
        return raw["method"], dict(raw["config"]), raw
    return *methods.from_peft(raw), raw


def load(
    folder: str | Path, params: Mapping[str, Any], sites: Sites, *, adapter: str = "default"
) -> tuple[Method, Partition, dict[str, Any]]:
    """(method, partition with the adapter's values, the raw config) of an adapter folder for these base parameters.

    Raises ValueError naming the tensor where one is missing, left over or of another shape.
    """
    folder = Path(folder)
    name, settings, raw = read_config(folder)
    if "adapter" in methods.defaults(name):
        settings["adapter"] = adapter
    method = methods.make(name, **settings)
    part = method.init(jax.random.key(0), params, sites)
    tensors = _read_tensors(folder / TENSORS)
    frozen, trainable = (tree.flatten(half) for half in part)
    theta = {path: leaf for half in (frozen, trainable) for path, leaf in half.items() if _is_theta(path, method)}
    filled = {path: np.zeros(leaf.shape, np.float32) for path, leaf in trainable.items()}
    for piece in parts(method):
        if piece.call is None:
            continue
        form = _form(piece)
        if form is not None and form.opened is not None:
            tensors = form.opened(tensors, method.config)
        slots = list(_slots(theta, piece, method, sites))
        tensors = _unstacked(tensors, slots, piece, raw, folder)
        wanted = [s for s in slots if s.path in trainable or _file_key(s, piece)]
        for slot, value in _unpack(tensors, wanted, piece, trainable, method.config, folder):
            if slot.path in trainable:
                filled[slot.path][slot.index] = value
            else:
                frozen[slot.path] = jnp.asarray(value, frozen[slot.path].dtype)
    for path, leaf in trainable.items():
        if path in theta:
            continue
        for key, index, own in _whole(path, leaf, method, sites):
            filled[path][index] = own.to_tree(_taken(tensors, key, own.tensor_shape, folder))
    for key in [k for k in tensors if k.endswith(".base_layer.weight")]:  # an embedding PEFT saved whole
        _replace_base(frozen, key, tensors.pop(key), folder)
    for head, path in _tied(trainable, sites).items():
        if np.array_equal(tensors.get(head, ()), filled[path]):
            del tensors[head]
    if tensors:
        first = sorted(tensors)[0]
        raise ValueError(f"{folder}: {first!r} (of {len(tensors)} left over) has no place in this model")
    if raw.get("peft_type") == "LORA" and (tied := _tied(trainable, sites)) and not raw.get("ensure_weight_tying"):
        raise Unsupported(
            f"{folder}: trains {next(iter(tied.values()))!r} apart from the head that shares it (no "
            "ensure_weight_tying); here it is one table: untie the base (tie_word_embeddings false, and a head)"
        )
    values = {path: jnp.asarray(value, trainable[path].dtype) for path, value in filled.items()}
    return method, Partition(tree.unflatten(frozen), tree.unflatten(values)), raw


def save(
    folder: str | Path,
    part: Partition,
    method: Method,
    sites: Sites,
    *,
    base: str | None = None,
    extra: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write the adapter; the folder appears under its name only when it is whole, and replaces an older one.

    Args:
      base: the base's path or hub id, for adapter_config.json.
      extra: fields to keep, such as an adapter's own when it is written again.
      tokenizer: laid beside when it changed.
    """
    folder = Path(folder)
    frozen, trainable = (tree.flatten(half) for half in part)
    theta = {path: leaf for half in (frozen, trainable) for path, leaf in half.items() if _is_theta(path, method)}
    tensors, config = {}, {k: v for k, v in method.config.items() if k != "adapter"}
    stacked: dict[str, str] = {}
    for piece in parts(method):
        if piece.call is None:
            continue
        slots = {(s.name, s.leaf): s for s in _slots(theta, piece, method, sites)}
        layers: hf.Layers = {}
        for slot in slots.values():
            value = _numbers(theta[slot.path])[slot.index]
            layers.setdefault(slot.name, {})[slot.leaf] = value
        form = _form(piece)
        if piece.move is not None and any(map(tree.is_packed, frozen.values())):
            logging.warning(
                "%s: the base was moved and packed again; on the base as others have it the adapter fits up to the "
                "rounding of its bits",
                folder,
            )
        if form is not None and form.settle is not None:
            layers, config = form.settle({n: v for n, v in layers.items() if n}, config)
        tensors |= _pack(layers, slots, piece, trainable, config)
        stacked |= _stack(tensors, slots.values(), piece, folder)
        if form is not None and form.closed is not None:
            tensors = form.closed(tensors, config)
    for path, leaf in trainable.items():
        if path not in theta:
            value = _numbers(leaf)
            for key, index, own in _whole(path, leaf, method, sites):
                tensors[key] = own.to_file(value[index])
    tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    file, written = _config(method, config, sites, base, extra or {}, stacked)
    if (tied := _tied(trainable, sites)) and "ensure_weight_tying" in written:
        written["ensure_weight_tying"] = True
        tensors |= {head: _numbers(trainable[path]) for head, path in tied.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.part{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old{os.getpid()}")
    new.mkdir()
    try:
        save_file(tensors, new / TENSORS, metadata={"format": "pt"})
        (new / file).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        (new / TENSORS).chmod((new / file).stat().st_mode)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(new))
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


# --- a method's leaves ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Slot:
    """One layer's part of a leaf: where it lies in the tree, and whose it is; name "" where all sites share it.

    experts: how many kernels its module stacks; 0 where it has one.
    window:  a convolution's sizes in space.
    """

    path: str
    index: tuple
    shape: tuple[int, ...]
    name: str
    leaf: str
    kind: str
    experts: int = 0
    window: tuple[int, ...] = ()


def _slots(theta: Mapping[str, Any], piece: Method, method: Method, sites: Sites) -> Iterator[_Slot]:
    """Every layer's part of one method's leaves, without padding; in the order in which the model calls its sites."""
    order = {path: i for i, path in enumerate(sites)}
    for path, leaf in sorted(theta.items(), key=lambda item: order.get(item[0].rsplit("/", 3)[0], -1)):
        place, own_piece, axes = theta_of(path, method, sites)
        last = path.rsplit("/", 1)[-1]
        if own_piece is not piece or last not in piece.axes:
            continue
        if place is None:
            yield _Slot(path, (), tuple(leaf.shape), "", last, "shared")
            continue
        own = leaf.shape[len(place.stack) :]
        for layer, name in enumerate(place.names):
            settings = piece.settings(name, place.kind) if piece.settings else {}
            if settings is None:
                continue
            shape = real_shape(settings, axes, own)
            at = np.unravel_index(layer, place.stack) if place.stack else ()
            at = (*at, *(slice(n) for n in shape))
            experts = place.stack[-1] if isinstance(place, Site) and place.n_stack else 0
            window = place.window if isinstance(place, Site) else ()
            yield _Slot(path, at, shape, name, last, place.kind, experts, window)


def _numbers(leaf: Any) -> np.ndarray:
    """A leaf on the host; floating numbers are float32 in every file."""
    value = np.asarray(jax.device_get(leaf))
    return value.astype(np.float32) if jnp.issubdtype(value.dtype, jnp.floating) else value


def _form(piece: Method) -> hf.Format | None:
    return getattr(methods.module(piece.name), "HF", None)


def _file_key(slot: _Slot, piece: Method) -> str | None:
    """The tensor that holds this slot; None where a PEFT folder holds none of its own."""
    form = _form(piece)
    if form is None:
        return ".".join(filter(None, (slot.name, piece.name, slot.leaf)))
    if slot.kind == "shared":
        return form.shared.get(slot.leaf)
    suffix = form.keys.get(slot.kind, {}).get(slot.leaf)
    return suffix and f"{PREFIX}{slot.name}.{suffix}"


def _to_file(value: np.ndarray, slot: _Slot, piece: Method) -> np.ndarray:
    """A leaf as the file has it."""
    form = _form(piece)
    if form is not None and slot.window and slot.leaf in form.windows:
        return hf.to_window(value, piece.axes[slot.leaf], slot.window)
    return value.T if form is not None and value.ndim == 2 else value


def _from_file(tensor: np.ndarray, slot: _Slot, piece: Method) -> np.ndarray:
    """Its inverse."""
    form = _form(piece)
    if form is not None and slot.window and slot.leaf in form.windows:
        return hf.from_window(tensor, piece.axes[slot.leaf], slot.window)
    return tensor.T if form is not None and tensor.ndim == 2 else tensor


def _pack(layers: hf.Layers, slots, piece: Method, trainable, config) -> dict[str, np.ndarray]:
    form = _form(piece)
    if form is not None and form.pack is not None:
        return form.pack(layers, config)
    tensors = {}
    for name, leaves in layers.items():
        for leaf, value in leaves.items():
            slot = slots[name, leaf]
            key = _file_key(slot, piece)
            if key is not None:
                tensors[key] = _to_file(value, slot, piece)
            elif slot.path in trainable:
                kind = form.peft_type if form else piece.name
                raise Unsupported(f"{slot.path}: {kind} has no file form here for a {slot.kind} site")
    return tensors


def _unpack(
    tensors: dict[str, np.ndarray], slots, piece: Method, trainable, config, folder: Path
) -> Iterator[tuple[_Slot, np.ndarray]]:
    form = _form(piece)
    if form is not None and form.unpack is not None:
        shapes: dict[str, dict[str, tuple]] = {}
        for slot in slots:
            shapes.setdefault(slot.name, {})[slot.leaf] = slot.shape
        try:
            layers = form.unpack(tensors, shapes, config)
        except KeyError as error:
            near = tree.nearest(str(error.args[0]), tensors, 1)
            raise ValueError(f"{folder}: holds no tensor {error}; the nearest: {near}") from None
        tensors.clear()
        for slot in slots:
            value = layers[slot.name][slot.leaf]
            if value.shape != slot.shape:
                raise ValueError(
                    f"{folder}: {slot.leaf!r} of {slot.name!r} has shape {value.shape}, this base needs {slot.shape}; "
                    "does the adapter belong to another model?"
                )
            yield slot, value
        return
    for slot in slots:
        key = _file_key(slot, piece)
        if key is None:
            raise Unsupported(f"{slot.path}: {form.peft_type} has no file form here for a {slot.kind} site")
        if slot.kind == "shared" and slot.path not in trainable and key not in tensors:
            continue  # the file leaves it to its seed
        shape = _to_file(np.empty(slot.shape, np.void), slot, piece).shape
        yield slot, _from_file(_taken(tensors, key, shape, folder), slot, piece)


def _taken(tensors: dict[str, np.ndarray], key: str, shape: tuple[int, ...], folder: Path) -> np.ndarray:
    if key not in tensors:
        raise ValueError(f"{folder}: holds no tensor {key!r}; the nearest: {tree.nearest(key, tensors, 1)}")
    tensor = tensors.pop(key)
    if tensor.shape != shape:
        raise ValueError(
            f"{folder}: {key!r} has shape {tensor.shape}, this base needs {shape}; does the adapter belong to "
            "another model?"
        )
    return tensor


def _is_theta(path: str, method: Method) -> bool:
    bits = path.split("/")
    return len(bits) > 2 and any(m.call and m.name == bits[-3] for m in parts(method))


# --- experts in one parameter ---------------------------------------------------------------------


def _experts(slots: Iterable[_Slot], piece: Method) -> dict[str, dict[str, list[_Slot]]]:
    """{stacked parameter: {leaf: the slots of all its experts}} of those stacks that are targets whole and alike."""
    form, found = _form(piece), {}
    if form is None or form.stacks is None or piece.settings is None:
        return {}
    for slot in slots:
        if slot.experts and _file_key(slot, piece):
            found.setdefault(slot.name.rpartition(".")[0], {}).setdefault(slot.leaf, []).append(slot)

    def alike(own: list[_Slot]) -> bool:
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
        parameter: (PREFIX + holder).rstrip(".") + ".base_layer" * depth
        for holder, held in holders.items()
        for depth, parameter in enumerate(reversed(held))
    }


def _stack(tensors: dict[str, np.ndarray], slots: Iterable[_Slot], piece: Method, folder: Path) -> dict[str, str]:
    """Put experts' tensors together, in place; {parameter: one of its experts' names}."""
    slots = list(slots)
    experts = _experts(slots, piece)
    alone = [s.name for s in slots if s.experts and s.name.rpartition(".")[0] not in experts]
    if alone:
        logging.warning(
            "%s: %r stands for itself, since its stack's experts are not all adapted alike; Hugging Face PEFT does not "
            "read it",
            folder,
            alone[0],
        )
    modules = _nested(experts)
    for parameter, leaves in experts.items():
        held = {
            leaf: np.stack([_from_file(tensors.pop(_file_key(s, piece)), s, piece) for s in own])
            for leaf, own in leaves.items()
        }
        tensors |= {f"{modules[parameter]}.{end}": value for end, value in _form(piece).stacks.pack(held).items()}
    return {parameter: next(iter(leaves.values()))[0].name for parameter, leaves in experts.items()}


def _unstacked(
    tensors: Mapping[str, np.ndarray], slots: Iterable[_Slot], piece: Method, config: Mapping[str, Any], folder: Path
) -> dict[str, np.ndarray]:
    """The file's tensors with those of stacked experts one by one."""
    tensors, experts = dict(tensors), _experts(slots, piece)
    found = {  # what is written one by one stays
        module: experts[parameter]
        for parameter, module in _nested(experts).items()
        if not any(_file_key(s, piece) in tensors for own in experts[parameter].values() for s in own)
    }
    held, shapes = [], []
    for module, leaves in found.items():
        zeros = {leaf: np.zeros((len(own), *own[0].shape), np.float32) for leaf, own in leaves.items()}
        keys = {end: f"{module}.{end}" for end in _form(piece).stacks.pack(zeros)}
        if missing := [key for key in keys.values() if key not in tensors]:
            near = tree.nearest(missing[0], tensors, 1)
            raise ValueError(f"{folder}: holds no tensor {missing[0]!r}; the nearest: {near}")
        held.append({end: tensors.pop(key) for end, key in keys.items()})
        shapes.append({leaf: value.shape for leaf, value in zeros.items()})
    if found:
        unpacked = _form(piece).stacks.unpack(held, shapes, config)
        for leaves, values in zip(found.values(), unpacked, strict=True):
            for leaf, own in leaves.items():
                tensors |= {_file_key(s, piece): _to_file(v, s, piece) for s, v in zip(own, values[leaf], strict=True)}
    return tensors


# --- whole leaves of the base ---------------------------------------------------------------------


def _whole(path: str, leaf: Any, method: Method, sites: Sites) -> Iterator[tuple[str, Any, names.Leaf]]:
    """Where a leaf of the base stands in the file: (tensor name, its part, how it is turned), layer by layer."""
    targeted = {n for s in sites.values() for n in s.names if _is_target(method, n, s.kind)}
    stacked = next(iter(names.walk({path: leaf})))
    for layer, name in enumerate(stacked.names):
        module, last = name.rsplit(".", 1)
        inside = ".base_layer" if module in targeted else ""
        index = (layer,) if stacked.stacked else ()
        shape = leaf.shape[stacked.stacked :]
        yield f"{PREFIX}{module}{inside}.{last}", index, names.Leaf(path, (), shape, leaf.dtype, False)


def _tied(trainable: Mapping[str, Any], sites: Sites) -> dict[str, str]:
    """{the name under which PEFT repeats it as the head's: path} of the trained table that a head shares."""
    heads = [site for site in sites.values() if site.kind == "head" and site.kernel in trainable]
    return {f"{PREFIX}{head.names[0]}.weight": head.kernel for head in heads}


def _is_target(method: Method, name: str, kind: str) -> bool:
    return any(m.settings and m.settings(name, kind) is not None for m in parts(method))


def _replace_base(base: dict[str, Any], key: str, tensor: np.ndarray, folder: Path) -> None:
    module = key.removeprefix(PREFIX).removesuffix(".base_layer.weight").replace(".", "/")
    path = f"{module}/embedding"
    if path not in base or base[path].shape != tensor.shape:
        raise ValueError(f"{folder}: {key!r} {tensor.shape} fits no table of this base; was its vocabulary resized?")
    base[path] = jnp.asarray(tensor, base[path].dtype)


def _config(
    method: Method, own: Mapping[str, Any], sites: Sites, base, extra, stacked: Mapping[str, str]
) -> tuple[str, dict[str, Any]]:
    """(file name, its JSON); stacked: parameter -> one of its experts, for those that stand in the file as one."""
    form = _form(method)
    if form is None:
        return OWN_CONFIG, {**extra, "method": method.name, "config": dict(own), "base_model_name_or_path": base}
    if stacked:
        own = form.stacks.settle(own, stacked)
    fields = form.write(own)
    if stacked and fields["target_modules"]:  # a pattern that reached a stack would meet its module in PEFT
        fields["target_modules"] = hf.BY_NAME
    if fields.get("target_modules") in ("all-linear", hf.BY_NAME):  # other readers know only names
        targets = {n for s in sites.values() for n in s.names if _is_target(method, n, s.kind)}
        targets = {n for n in targets if n.rpartition(".")[0] not in stacked}
        whole = fields["target_modules"] == hf.BY_NAME
        fields["target_modules"] = sorted(targets if whole else {n.rsplit(".", 1)[-1] for n in targets})
    for field in [f for f in fields if f.endswith("_pattern") and isinstance(fields[f], Mapping)]:
        names_here = [n for s in sites.values() for n in s.names if _is_target(method, n, s.kind)]
        fields[field] = hf.in_any_order(fields[field], [*names_here, *stacked])
    if base is not None or "base_model_name_or_path" not in extra:
        fields["base_model_name_or_path"] = base
    always = {"task_type": "CAUSAL_LM", "revision": None, "auto_mapping": None}
    return PEFT_CONFIG, {**always, **extra, **fields, "peft_type": form.peft_type, "inference_mode": True}


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    if not file.exists():
        pickled = file.with_name("adapter_model.bin").exists()
        hint = "; adapter_model.bin is pickle, which is never read: save it as safetensors" if pickled else ""
        raise FileNotFoundError(f"{file.parent}: holds no {file.name}{hint}")
    try:
        with safe_open(file, "np") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file}: is no whole safetensors file ({error}); was it copied whole?") from None
