"""A base model's parameters: load, save, fingerprint.

Loaded leaf by leaf onto their shards, saved as a Hugging Face folder, told apart by a hash.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from peftax import processes
from peftax.core import quantization
from peftax.core import tree as trees
from peftax.core.targets import CLASSIFIERS
from peftax.ops.qtensor import QTensor, dense
from peftax.ops.quantize import nested_scales
from peftax.weights import bitsandbytes, names, source
from peftax.weights.source import Source

TOGETHER = 64 << 20  # bytes of a leaf that are put together on the host, or for each shard; above it layer by layer
HEAD = "lm_head.weight"
SLAB = 128 << 20  # bytes that are read at once
ARCHITECTURES = {
    "bert": "BertModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
CLASSIFIER = "ForSequenceClassification"  # ends the name of a classifier's architecture


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
    """Every tensor is there in its shape, before they are read; a head that config.json ties is the table; what is left
    over is named.
    """
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
    if tied and HEAD in unused and not any(head in abstract for head in CLASSIFIERS):
        _check_tied(weights, leaves)
    unused = sorted(
        name
        for name in unused
        if not name.endswith(("rotary_emb.inv_freq", "position_ids")) and not (tied and name == HEAD)
    )
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        first = ", ".join(unused[:3])
        logging.warning("%s: not used by the model: %s%s", weights.path, first, more)


def _check_tied(weights: Source, leaves: Iterable[names.Leaf]) -> None:
    """Raise where a file's head is not the table, which transformers then does not tie; read some rows at a time."""
    table = next((n for leaf in leaves for n in leaf.names if n.endswith("embed_tokens.weight")), None)
    if table is None:
        return
    (rows, *width), (others, *same) = (weights.shape(name) for name in (HEAD, table))
    cuts = _cuts(slice(0, min(rows, others)), math.prod(width) * weights.dtype(HEAD).itemsize)  # a table may be grown
    inside = tuple(slice(0, n) for n in width)

    def equal(cut: slice) -> bool:
        head, own = (weights.read(name, index=(cut, *inside)) for name in (HEAD, table))
        return np.array_equal(head, own)

    if width != same or not all(map(equal, cuts)):
        raise ValueError(
            f"{weights.path}: {HEAD!r} is another table than {table!r}, and would be lost, since config.json ties the "
            "two: set tie_word_embeddings to false there"
        )


def _place(weights: Source, leaf: names.Leaf, dtype: np.dtype, place: Any) -> jax.Array:
    whole = jax.ShapeDtypeStruct(leaf.shape, dtype)
    if place is None:
        return jax.device_put(_read(weights, leaf, dtype, (slice(None),) * len(leaf.shape)))
    if not _by_layer(leaf, whole, place):
        return _shards(whole, place, lambda index: _read(weights, leaf, dtype, index))
    one, at = _of_one_layer(whole, place)
    layers = (
        _shards(one, at, functools.partial(_block, weights, leaf, layer, dtype=dtype))
        for layer in range(len(leaf.names))
    )
    return _stacked(whole, place, layers)


def _shards(x: Any, place: Any, read: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    """An array of which this process reads its own shards, one after another; replicas are read once."""
    of: dict[Any, list[Any]] = {}
    for device, index in place.addressable_devices_indices_map(x.shape).items():
        key = tuple(s.indices(n) for s, n in zip(index, x.shape, strict=True))
        of.setdefault(key, []).append(device)
    parts = []
    for key, devices in of.items():
        part = read(tuple(slice(*k) for k in key))
        parts += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    return jax.make_array_from_single_device_arrays(x.shape, place, parts, dtype=x.dtype)


def _by_layer(leaf: names.Leaf, shapes: Any, places: Any) -> bool:
    """Is a leaf laid on its devices layer by layer? Else it is put together on the host, or each of its shards is."""
    whole = [isinstance(at, NamedSharding) and not any(at.spec[:1]) for at in jax.tree.leaves(places)]
    return leaf.stacked and all(whole) and trees.nbytes(shapes) > TOGETHER


def _of_one_layer(shapes: Any, places: Any) -> tuple[Any, Any]:
    """(shapes of one layer, how they lie)"""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
    return one, jax.tree.map(lambda at: NamedSharding(at.mesh, PartitionSpec(*at.spec[1:])), places)


def _stacked(shapes: Any, places: Any, layers: Iterable[Any]) -> Any:
    """Layers laid one by one into their stack, which is made where it lies: the host holds one at a time."""
    empty = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # noqa: E731
    stack = jax.jit(empty, out_shardings=places)()

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=places)
    def lay(stack, layer, i):
        return jax.tree.map(lambda into, x: jax.lax.dynamic_update_index_in_dim(into, x, i, 0), stack, layer)

    for i, layer in enumerate(layers):
        stack = jax.block_until_ready(lay(stack, layer, i))
    return stack


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


def _pack(weights: Source, leaf: names.Leaf, wanted: QTensor, places: Any) -> QTensor:
    """A leaf in few bits, read and packed layer by layer."""
    if places is not None and _by_layer(leaf, wanted, places):
        return _pack_on_shards(weights, leaf, wanted, places)
    stack = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), wanted)
    for layer, name in enumerate(leaf.names):
        if (made := _as_it_lies(weights, leaf, name, wanted)) is None:
            made = _packed(weights, name, jnp.asarray(leaf.to_tree(weights.read(name))), wanted)
        for into, x in zip(jax.tree.leaves(stack), jax.tree.leaves(made), strict=True):
            into[layer if leaf.stacked else ...] = x
    if places is None:
        return jax.tree.map(jax.device_put, stack)
    return jax.tree.map(lambda x, at: _shards(x, at, x.__getitem__), stack, places)


def _as_it_lies(weights: Source, leaf: names.Leaf, name: str, wanted: QTensor) -> QTensor | None:
    """A tensor that its file holds in the bits that are wanted, in numpy arrays; None where it holds others."""
    if weights.packed(name) != wanted.fmt:
        return None
    made = weights.read_packed(name)
    if [x.shape for x in jax.tree.leaves(made)] != [x.shape[leaf.stacked :] for x in jax.tree.leaves(wanted)]:
        raise ValueError(
            f"{weights.path}: tensor {name!r} lies in {wanted.fmt} with groups of {made.group}, not as its other "
            "layers or config.model.quantize would have it; start from float weights"
        )
    return jax.tree.unflatten(jax.tree.structure(wanted), jax.tree.leaves(made))


def _packed(weights: Source, name: str, numbers: jax.Array, wanted: QTensor) -> QTensor:
    try:
        return quantization.like(numbers, wanted)
    except ValueError as error:
        raise ValueError(f"{weights.path}: tensor {name!r}: {error}") from error


def _pack_on_shards(weights: Source, leaf: names.Leaf, wanted: QTensor, places: QTensor) -> QTensor:
    """`_pack` where this process reads and packs no more than its own shards of each layer.

    Second scales belong to a whole weight: they are made of the first ones that all processes have found.
    """
    one, at = _of_one_layer(wanted, places)
    plain = dataclasses.replace(one, nested=None, offset=None)
    first = jax.ShapeDtypeStruct(one.scale.shape, jnp.float32) if one.double else one.scale
    whole = NamedSharding(at.packed.mesh, PartitionSpec())
    nest = jax.jit(
        lambda scale: nested_scales(jax.lax.with_sharding_constraint(scale, whole)),
        out_shardings=(at.scale, at.nested, at.offset),
    )

    def of_layer(layer: int) -> QTensor:
        name = leaf.names[layer]
        if (made := _as_it_lies(weights, leaf, name, wanted)) is not None:
            return jax.tree.map(lambda x, at: _shards(x, at, x.__getitem__), made, at)
        parts: dict[Any, QTensor] = {}

        def part(groups: slice, columns: slice) -> QTensor:
            key = (groups.start, groups.stop, columns.start, columns.stop)
            if key not in parts:
                rows = slice(groups.start * one.group, groups.stop * one.group)
                parts[key] = _packed_part(weights, leaf, layer, rows, columns, plain)
            return parts[key]

        def bytes_of(index):
            """A device's bytes, cut out of the groups that it has the scales of: its own, or all where it cuts one."""
            rows, columns = index
            by, n = one.group // one.per_byte, first.shape[0]
            groups = slice(rows.start // by, rows.stop // by) if at.scale.spec[0] else slice(0, n)
            return part(groups, columns).packed[rows.start - groups.start * by : rows.stop - groups.start * by]

        def stats(of):
            return lambda index: getattr(part(index[0], index[2]), of)

        made = {"packed": _shards(one.packed, at.packed, bytes_of), "scale": _shards(first, at.scale, stats("scale"))}
        if one.low is not None:
            made["low"] = _shards(one.low, at.low, stats("low"))
        if one.double:
            made["scale"], made["nested"], made["offset"] = nest(made["scale"])
        return dataclasses.replace(one, **made)

    return _stacked(wanted, places, (of_layer(layer) for layer in range(len(leaf.names))))


def _packed_part(
    weights: Source, leaf: names.Leaf, layer: int, rows: slice, columns: slice, wanted: QTensor
) -> QTensor:
    """Whole groups of some columns of one layer, in numpy arrays; read and packed some columns at a time."""
    made = []
    for cut in _cuts(columns, (rows.stop - rows.start) * leaf.dtype.itemsize):
        numbers = jnp.asarray(_block(weights, leaf, layer, (rows, cut)))
        made.append(jax.tree.map(np.asarray, _packed(weights, leaf.names[layer], numbers, wanted)))
    return jax.tree.map(lambda *x: np.concatenate(x, axis=-1), *made)


def _read(weights: Source, leaf: names.Leaf, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """A block of a leaf; the slice over layers picks the files' tensors."""
    spans = [range(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True)]
    block = np.empty([len(span) for span in spans], dtype)
    own = tuple(slice(span.start, span.stop) for span in spans[leaf.stacked :])
    layers = spans[0] if leaf.stacked else (0,)
    for part, layer in zip(block if leaf.stacked else (block,), layers, strict=True):
        _fill(part, weights, leaf, layer, own)
    return block


def _block(
    weights: Source, leaf: names.Leaf, layer: int, own: tuple[slice, ...], *, dtype: np.dtype | None = None
) -> np.ndarray:
    """A block of one layer's tensor as the tree holds it; dtype None: the file's."""
    kind = weights.dtype(leaf.names[layer]) if dtype is None else dtype
    return _fill(np.empty([s.stop - s.start for s in own], kind), weights, leaf, layer, own)


def _fill(block: np.ndarray, weights: Source, leaf: names.Leaf, layer: int, own: tuple[slice, ...]) -> np.ndarray:
    """The block, filled some of the file's rows at a time."""
    into, inside = leaf.to_file(block), tuple(own[axis] for axis in leaf.order)
    if not inside:
        into[...] = weights.read(leaf.names[layer], index=inside)
        return block
    row = block.nbytes // max(1, len(into))
    for cut in _cuts(inside[0], row):
        at = slice(cut.start - inside[0].start, cut.stop - inside[0].start)
        into[at] = weights.read(leaf.names[layer], index=(cut, *inside[1:]))
    return block


def _cuts(span: slice, row: int) -> Iterator[slice]:
    """The span in about equal runs of at most SLAB bytes, `row` bytes each."""
    n = span.stop - span.start
    runs = max(1, -(-n * row // SLAB))
    step = max(1, -(-n // runs))
    for start in range(span.start, span.stop, step):
        yield slice(start, min(start + step, span.stop))


def save(
    params: trees.Tree,
    config: Mapping[str, Any],
    into: str | Path,
    *,
    tokenizer: Any = None,
    generation: Mapping[str, Any] | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    read: Callable[[str, int | None], Any] | None = None,
) -> Path:
    """Write a Hugging Face checkpoint folder; it appears under its name only when it is whole.

    Weights in nf4 and fp4 are written as bitsandbytes holds them, in other formats as numbers. Of several processes
    all call it and the first writes.

    Args:
      params: the tree; layers scanned or not, on any sharding. Shapes, where `read` makes the leaves.
      config: the checkpoint's config.json; dtype, architecture, untied head are brought up to date.
      into: a folder that does not exist or is empty.
      tokenizer: a transformers tokenizer to lay beside.
      generation: the base's generation_config.json; ids that it does not say are the config's or the tokenizer's.
      dtype: of the floating tensors in the file; None keeps each.
      max_shard_bytes: a file's limit; one tensor above it gets a file of its own.
      read: (a leaf's path, a layer of its stack or None) -> what is written there; asked for one after another.
    """
    into = Path(into)
    if processes.first():
        beside = {"tokenizer": tokenizer, "generation": generation}
        save_alone(params, config, into, **beside, dtype=dtype, max_shard_bytes=max_shard_bytes, read=read)
    else:
        _write_tensors(params, read, None, dtype, max_shard_bytes)  # hands over its shards
    processes.wait(f"{into.name} is written")
    return into


def save_alone(
    params: trees.Tree,
    config: Mapping[str, Any],
    into: Path,
    *,
    tokenizer: Any = None,
    generation: Mapping[str, Any] | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    read: Callable[[str, int | None], Any] | None = None,
) -> None:
    """What `save` does, by this process without the others, of a tree that it holds whole or they hand over."""
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise FileExistsError(f"{into}: exists; remove it or choose another folder")
    into.parent.mkdir(parents=True, exist_ok=True)
    part = into.with_name(f".{into.name}.part{os.getpid()}")
    part.mkdir()
    try:
        kind = _write_tensors(params, read, part, dtype, max_shard_bytes)
        _write_config(params, config, kind, tokenizer, generation, part)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(part))
        part.replace(into)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_tensors(params: trees.Tree, read: Callable | None, into: Path | None, dtype: Any, limit: int) -> np.dtype:
    """Write the shards (None: only take part in gathering them); returns the type of the floating tensors."""
    flat, leaves = trees.flatten(params), list(names.walk(params))
    target = None if dtype is None else np.dtype(jnp.dtype(dtype))

    def stored(leaf: names.Leaf) -> np.dtype:
        return target if target and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype

    def part(leaf: names.Leaf, layer: int) -> Any:
        if read is not None:
            return read(leaf.path, layer if leaf.stacked else None)
        return jax.tree.map(lambda x: x[layer], flat[leaf.path]) if leaf.stacked else flat[leaf.path]

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
        ready, asked = {}, {}  # few bits are small, and several tensors a leaf; numbers are made as they are written
        for leaf, layer in shard:
            if as_bits(flat[leaf.path]):
                own = jax.tree.map(processes.whole, part(leaf, layer))
                ready |= bitsandbytes.to_tensors(leaf.names[layer], own)
            else:
                asked[leaf.names[layer]] = (leaf, layer)

        def make(name: str, ready=ready, asked=asked) -> np.ndarray:
            if name in ready:
                return ready[name]
            leaf, layer = asked[name]
            return leaf.to_file(processes.whole(dense(part(leaf, layer)))).astype(stored(leaf), copy=False)

        kinds = {name: (x.dtype, x.shape) for name, x in ready.items()}
        kinds |= {name: (stored(leaf), leaf.tensor_shape) for name, (leaf, _) in asked.items()}
        source.write(None if into is None else into / file, kinds, make)
        weight_map.update(dict.fromkeys(kinds, file))
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


def _write_config(
    params: trees.Tree, config: Mapping[str, Any], kind: np.dtype, tokenizer: Any, generation: Any, into: Path
) -> None:
    config = {k: v for k, v in config.items() if k != "quantization_config"} | _quantization_config(params)
    # transformers 5 writes "dtype"; version 4 reads "torch_dtype"
    config |= {"dtype": kind.name, "torch_dtype": kind.name}
    name = ARCHITECTURES.get(config.get("model_type", ""))
    if name is not None and any(head in params for head in CLASSIFIERS):
        name = re.sub("(ForCausalLM|Model)$", CLASSIFIER, name)
        config["architectures"] = [name]
    elif name is not None and config.get("architectures") is None:
        config["architectures"] = [name]
    if "lm_head" in params:
        config["tie_word_embeddings"] = False
    _dump(into / "config.json", config)
    said = {k: v for k, v in (generation or {}).items() if v is not None}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        value = getattr(tokenizer, key, None) if value is None else value
        if value is not None:
            said.setdefault(key, value)
    if generation or "eos_token_id" in said:
        _dump(into / source.GENERATION, said)


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
