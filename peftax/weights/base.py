"""A base model's parameters: load, save, fingerprint.

Loaded leaf by leaf onto their shards, saved as a Hugging Face folder, told apart by a hash.
"""

from __future__ import annotations

import hashlib
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
from safetensors.numpy import save_file

from peftax import processes
from peftax.core import quantization
from peftax.core import tree as trees
from peftax.ops.qtensor import QTensor, dense
from peftax.weights import bitsandbytes, names, source
from peftax.weights.source import Source

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}


def load(
    weights: Source | str | Path,
    abstract: trees.Tree,
    *,
    shardings: trees.Tree | None = None,
    dtype: Any = None,
) -> dict[str, Any]:
    """The tree `abstract` asks for, filled from `weights`, one leaf at a time.

    Args:
      weights: an open source, or what `weights.open` takes.
      abstract: nested dict of shapes, as from jax.eval_shape of a model's init; layers scanned or
        not. A QTensor of shapes asks for a weight in few bits: taken as it lies where the file holds it so, else
        packed layer by layer, with one layer's numbers in memory at a time.
      shardings: nested dict of jax.sharding.Sharding; each process then reads only its own shards'
        slices of the files.
      dtype: of all floating leaves; None takes those of `abstract`.
    """
    weights = weights if isinstance(weights, Source) else source.open(weights)
    check(weights, abstract)
    leaves = list(names.walk(abstract))
    places = {} if shardings is None else trees.flatten(shardings)
    if shardings is not None and places.keys() != {leaf.path for leaf in leaves}:
        wrong = sorted(places.keys() ^ {leaf.path for leaf in leaves})
        raise ValueError(f"shardings and parameters differ: {', '.join(wrong[:3])}")
    params, wanted = {}, trees.flatten(abstract)
    for leaf in leaves:
        if isinstance(wanted[leaf.path], QTensor):
            params[leaf.path] = _pack(weights, leaf, wanted[leaf.path], places.get(leaf.path))
            continue
        kind = leaf.dtype
        if dtype is not None and jnp.issubdtype(kind, jnp.floating):
            kind = np.dtype(jnp.dtype(dtype))
        params[leaf.path] = _place(weights, leaf, kind, places.get(leaf.path))
    return trees.unflatten(params)


def check(weights: Source, abstract: trees.Tree) -> None:
    """Every tensor is there in its shape, before the first is read; what is left over is named."""
    leaves = list(names.walk(abstract))
    try:
        config = weights.config
    except FileNotFoundError:  # a model of one's own needs none
        config = {}
    have = set(weights.names())
    missing = [name for leaf in leaves for name in leaf.names if name not in have]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        near = trees.nearest(missing[0], have)
        raise ValueError(f"{weights.path}: holds no tensor {missing[0]!r}{more}; nearest: {near}")
    for leaf in leaves:
        for name in leaf.names:
            if (shape := weights.shape(name)) != leaf.tensor_shape:
                raise ValueError(
                    f"{weights.path}: tensor {name!r} has shape {shape}, the model needs "
                    f"{leaf.tensor_shape}; do config.json and weights belong together?"
                )
    unused = have.difference(*(leaf.names for leaf in leaves))
    tied = config.get("tie_word_embeddings", False)
    unused = sorted(
        name for name in unused if not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
    )
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        first = ", ".join(unused[:3])
        logging.warning("%s: not used by the model: %s%s", weights.path, first, more)


def _place(weights: Source, leaf: names.Leaf, dtype: np.dtype, sharding: Any) -> jax.Array:
    if sharding is None:
        return jax.device_put(_read(weights, leaf, dtype, (slice(None),) * len(leaf.shape)))
    parts: dict[Any, np.ndarray] = {}  # replicas of a shard are read once

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple(s.indices(n) for s, n in zip(index, leaf.shape, strict=True))
        if key not in parts:
            parts[key] = _read(weights, leaf, dtype, index)
        return parts[key]

    return jax.make_array_from_callback(leaf.shape, sharding, shard)


def as_filed(weights: Source, shapes: trees.Tree, paths: Iterable[str]) -> dict[str, QTensor]:
    """{path: QTensor of shapes} of those kernels that lie packed in the file, every layer alike."""
    found = {}
    for leaf in names.walk(shapes):
        if leaf.path not in paths or len(kinds := {weights.packed(n) for n in leaf.names}) != 1 or None in kinds:
            continue
        one = trees.abstract(weights.read_packed(leaf.names[0]))
        lead = leaf.shape[: leaf.stacked]
        stack = jax.tree.map(lambda x, lead=lead: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), one)
        found[leaf.path] = stack.astype(leaf.dtype)
    return found


def _pack(weights: Source, leaf: names.Leaf, wanted: QTensor, sharding: Any) -> QTensor:
    """A leaf in few bits, read and packed layer by layer."""
    stack = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), wanted)
    own = [x.shape[leaf.stacked :] for x in jax.tree.leaves(wanted)]
    for layer, name in enumerate(leaf.names):
        if weights.packed(name) == wanted.fmt:
            made = weights.read_packed(name)
        else:
            try:
                made = quantization.like(jnp.asarray(leaf.to_tree(weights.read(name))), wanted)
            except ValueError as error:
                raise ValueError(f"{weights.path}: tensor {name!r}: {error}") from error
        if [x.shape for x in jax.tree.leaves(made)] != own:
            raise ValueError(
                f"{weights.path}: tensor {name!r} lies in {wanted.fmt} with groups of {made.group}, not as its other "
                "layers or config.model.quantize would have it; start from float weights"
            )
        for into, x in zip(jax.tree.leaves(stack), jax.tree.leaves(made), strict=True):
            into[layer if leaf.stacked else ...] = x
    if sharding is None:
        return jax.tree.map(jax.device_put, stack)
    return jax.tree.map(lambda x, at: jax.make_array_from_callback(x.shape, at, lambda i: x[i]), stack, sharding)


def _read(weights: Source, leaf: names.Leaf, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """A block of a leaf; the slice over layers picks the files' tensors."""
    spans = [range(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True)]
    block = np.empty([len(span) for span in spans], dtype)
    own = [slice(span.start, span.stop) for span in spans[leaf.stacked :]]
    inside = tuple(own[axis] for axis in leaf.order)
    layers = spans[0] if leaf.stacked else (0,)
    for part, layer in zip(block if leaf.stacked else (block,), layers, strict=True):
        part[...] = leaf.to_tree(weights.read(leaf.names[layer], index=inside))
    return block


def save(
    params: trees.Tree,
    config: Mapping[str, Any],
    into: str | Path,
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a Hugging Face checkpoint folder; it appears under its name only when it is whole.

    Weights in nf4 and fp4 are written as bitsandbytes holds them, in other formats as numbers. Of several processes
    all call it and the first writes.

    Args:
      params: the tree; layers scanned or not, on any sharding.
      config: the checkpoint's config.json; dtype, architecture, untied head are brought up to date.
      into: a folder that does not exist or is empty.
      tokenizer: a transformers tokenizer to lay beside.
      dtype: of the floating tensors in the file; None keeps each.
      max_shard_bytes: a file's limit; one tensor above it gets a file of its own.
    """
    into = Path(into)
    if not processes.first():
        _write_tensors(params, None, dtype, max_shard_bytes)  # hands over its shards
        processes.wait(f"{into.name} is written")
        return into
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise FileExistsError(f"{into}: exists; remove it or choose another folder")
    into.parent.mkdir(parents=True, exist_ok=True)
    part = into.with_name(f".{into.name}.part{os.getpid()}")
    part.mkdir()
    try:
        kind = _write_tensors(params, part, dtype, max_shard_bytes)
        _write_config(params, config, kind, tokenizer, part)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(part))
        mode = (part / "config.json").stat().st_mode  # save_file makes files private
        for file in part.glob("*.safetensors"):
            file.chmod(mode)
        part.replace(into)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    processes.wait(f"{into.name} is written")
    return into


def _write_tensors(params: trees.Tree, into: Path | None, dtype: Any, limit: int) -> np.dtype:
    """Write the shards (None: only take part in gathering them); returns the type of the floating tensors."""
    flat, leaves = trees.flatten(params), list(names.walk(params))
    target = None if dtype is None else np.dtype(jnp.dtype(dtype))

    def stored(leaf: names.Leaf) -> np.dtype:
        return target if target and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype

    shards: list[list[tuple[names.Leaf, int]]] = [[]]
    held = total = 0
    for leaf in leaves:
        size = int(np.prod(leaf.tensor_shape)) * stored(leaf).itemsize
        for layer in range(len(leaf.names)):
            if shards[-1] and held + size > limit:
                shards.append([])
                held = 0
            shards[-1].append((leaf, layer))
            held, total = held + size, total + size
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else source.SINGLE
        tensors = {}
        for leaf, parts in _by_leaf(shard):
            bits, x = as_bits(flat[leaf.path]), flat[leaf.path]
            if not bits and not any(map(processes.spread, jax.tree.leaves(x))):
                x = np.asarray(dense(x))
            for layer in parts:
                own = jax.tree.map(lambda x, i=layer: x[i], x) if leaf.stacked else x
                if bits:
                    own = bitsandbytes.to_tensors(leaf.names[layer], jax.tree.map(processes.whole, own))
                else:
                    own = leaf.to_file(processes.whole(dense(own)))
                    # save_file writes the memory as it lies: it must be contiguous
                    own = {leaf.names[layer]: np.ascontiguousarray(own, dtype=stored(leaf)).reshape(own.shape)}
                if into is not None:
                    tensors |= own
        if into is not None:
            save_file(tensors, into / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    if into is not None and len(shards) > 1:
        _dump(into / source.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    floats = [stored(leaf) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return floats[0] if floats else np.dtype(np.float32)


def as_bits(leaf: Any) -> bool:
    """Is it written as it lies? Other formats are written as numbers."""
    return isinstance(leaf, QTensor) and leaf.fmt in bitsandbytes.FORMATS


def _quantization_config(params: trees.Tree) -> dict[str, Any]:
    """What transformers has to know of weights in few bits."""
    flat = trees.flatten(params)
    kinds = {(x.fmt, x.double) for x in flat.values() if as_bits(x)}
    if not kinds:
        return {}
    if len(kinds) > 1:
        raise ValueError(f"a checkpoint holds 4 bits of one kind, not {sorted(kinds)}; pack all alike")
    ((fmt, double),) = kinds
    kernels = [leaf for leaf in names.walk(params) if leaf.path.endswith("/kernel") and not as_bits(flat[leaf.path])]
    how = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": fmt,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted({"lm_head", *(n.removesuffix(".weight") for k in kernels for n in k.names)}),
    }
    return {"quantization_config": how}


def _by_leaf(shard: list[tuple[names.Leaf, int]]) -> Iterator[tuple[names.Leaf, list[int]]]:
    layers: dict[str, tuple[names.Leaf, list[int]]] = {}
    for leaf, layer in shard:
        layers.setdefault(leaf.path, (leaf, []))[1].append(layer)
    yield from layers.values()


def _write_config(params: trees.Tree, config: Mapping[str, Any], kind: np.dtype, tokenizer: Any, into: Path) -> None:
    config = {k: v for k, v in config.items() if k != "quantization_config"} | _quantization_config(params)
    # transformers 5 writes "dtype"; version 4 reads "torch_dtype"
    config |= {"dtype": kind.name, "torch_dtype": kind.name}
    if config.get("architectures") is None and config.get("model_type") in ARCHITECTURES:
        config["architectures"] = [ARCHITECTURES[config["model_type"]]]
    if "lm_head" in params:
        config["tie_word_embeddings"] = False
    _dump(into / "config.json", config)
    ids = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        ids[key] = getattr(tokenizer, key, None) if value is None else value
    if ids["eos_token_id"] is not None:
        _dump(into / "generation_config.json", {k: v for k, v in ids.items() if v is not None})


def _dump(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fingerprint(params: trees.Tree) -> str:
    """A hash of every number, type and name; the same for any sharding, layers scanned or not."""
    digests = {}
    for leaf, x in zip(names.walk(params), trees.flatten(params).values(), strict=True):
        # of a packed weight several; what lies over several processes is gathered layer by layer
        held = [part if processes.spread(part) else np.asarray(part) for part in jax.tree.leaves(x)]
        kind = f"{leaf.dtype.name} {x.fmt}" if isinstance(x, QTensor) else leaf.dtype.name
        for layer, name in enumerate(leaf.names):
            digest = hashlib.blake2b(f"{leaf.tensor_shape} {kind}".encode())
            for part in held:
                own = np.ascontiguousarray(processes.whole(part[layer] if leaf.stacked else part))
                digest.update(own.reshape(-1).view(np.uint8))
            digests[name] = digest.hexdigest()
    return hashlib.blake2b(json.dumps(digests, sort_keys=True).encode(), digest_size=16).hexdigest()
