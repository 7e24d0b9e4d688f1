"""Adapters in and out: Hugging Face PEFT's folder where the method has a PEFT type, the same tensors beside
our own JSON elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from peftax import methods
from peftax.core import tree
from peftax.core.hf import Unsupported
from peftax.core.method import Method, Partition, parts
from peftax.core.sites import Sites, real_shape, theta_of
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
    base = tree.flatten(part.frozen)
    filled = {}
    for path, leaf in tree.flatten(part.trainable).items():
        value = np.zeros(leaf.shape, np.float32)
        for key, index, own in _places(path, leaf, method, sites):
            if key not in tensors:
                raise ValueError(f"{folder}: holds no tensor {key!r}; the nearest: {tree.nearest(key, tensors, 1)}")
            tensor = tensors.pop(key)
            if tensor.shape != own.tensor_shape:
                raise ValueError(
                    f"{folder}: {key!r} has shape {tensor.shape}, this base needs {own.tensor_shape}; "
                    "does the adapter belong to another model?"
                )
            value[index] = own.to_tree(tensor)
        filled[path] = jnp.asarray(value, leaf.dtype)
    for key in [k for k in tensors if k.endswith(".base_layer.weight")]:  # an embedding PEFT saved whole
        _replace_base(base, key, tensors.pop(key), folder)
    if tensors:
        first = sorted(tensors)[0]
        raise ValueError(f"{folder}: {first!r} (of {len(tensors)} left over) has no place in this model")
    return method, Partition(tree.unflatten(base), tree.unflatten(filled)), raw


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
    tensors = {}
    for path, leaf in tree.flatten(part.trainable).items():
        value = np.asarray(jax.device_get(leaf)).astype(np.float32)
        for key, index, own in _places(path, leaf, method, sites):
            tensors[key] = np.ascontiguousarray(own.to_file(value[index]))
    file, config = _config(method, sites, base, extra or {})
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.part{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old{os.getpid()}")
    new.mkdir()
    try:
        save_file(tensors, new / TENSORS, metadata={"format": "pt"})
        (new / file).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
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


def _places(path: str, leaf: Any, method: Method, sites: Sites) -> Iterator[tuple[str, Any, names.Leaf]]:
    """Where a trainable leaf stands in the file: (tensor name, its part of the leaf, how it is turned), layer
    by layer.
    """
    if _is_theta(path, method):
        site, piece, axes = theta_of(path, method, sites)
        form = methods.module(piece.name).HF
        if site.kind not in form.keys:
            raise Unsupported(f"{path}: {form.peft_type} has no file form here for a {site.kind} site")
        suffix = form.keys[site.kind][path.rsplit("/", 1)[-1]]
        own = leaf.shape[len(site.stack) :]
        for layer, name in enumerate(site.names):
            settings = piece.settings(name, site.kind)
            if settings is None:
                continue
            shape = real_shape(settings, axes, own)
            at = np.unravel_index(layer, site.stack) if site.stack else ()
            index = (*at, *(slice(n) for n in shape))
            kind = "kernel" if len(shape) == 2 else "leaf"
            yield f"{PREFIX}{name}.{suffix}", index, names.Leaf(kind, (), shape, leaf.dtype, False)
        return
    targeted = {n for s in sites.values() for n in s.names if _is_target(method, n, s.kind)}
    stacked = next(iter(names.walk({path: leaf})))
    for layer, name in enumerate(stacked.names):
        module, last = name.rsplit(".", 1)
        inside = ".base_layer" if module in targeted else ""
        index = (layer,) if stacked.stacked else ()
        shape = leaf.shape[stacked.stacked :]
        yield (
            f"{PREFIX}{module}{inside}.{last}",
            index,
            names.Leaf(path, (), shape, leaf.dtype, False),
        )


def _is_theta(path: str, method: Method) -> bool:
    bits = path.split("/")
    return len(bits) > 3 and any(m.call and m.name == bits[-3] for m in parts(method))


def _is_target(method: Method, name: str, kind: str) -> bool:
    return any(m.settings and m.settings(name, kind) is not None for m in parts(method))


def _replace_base(base: dict[str, Any], key: str, tensor: np.ndarray, folder: Path) -> None:
    module = key.removeprefix(PREFIX).removesuffix(".base_layer.weight").replace(".", "/")
    path = f"{module}/embedding"
    if path not in base or base[path].shape != tensor.shape:
        raise ValueError(f"{folder}: {key!r} {tensor.shape} fits no table of this base; was its vocabulary resized?")
    base[path] = jnp.asarray(tensor, base[path].dtype)


def _config(method: Method, sites: Sites, base: str | None, extra) -> tuple[str, dict[str, Any]]:
    own = {k: v for k, v in method.config.items() if k != "adapter"}
    form = getattr(methods.module(method.name), "HF", None)
    if form is None:
        return OWN_CONFIG, {**extra, "method": method.name, "config": own, "base_model_name_or_path": base}
    fields = form.write(own)
    if fields.get("target_modules") == "all-linear":  # other readers know only names
        fields["target_modules"] = sorted(
            {n.rsplit(".", 1)[-1] for s in sites.values() for n in s.names if _is_target(method, n, s.kind)}
        )
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
