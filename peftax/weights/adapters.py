"""Adapters in and out: Hugging Face PEFT's folder where the method has a PEFT type, the same tensors beside
our own JSON elsewhere. A chain's folder holds one of each of its methods, and our own JSON.
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

from peftax import methods, processes
from peftax.core import hf, quantization, tree
from peftax.core.adapters import Slot, is_theta, own_leaves
from peftax.core.adapters import slots as slots_of
from peftax.core.hf import Unsupported
from peftax.core.method import Method, Partition, chain, parts
from peftax.core.sites import Sites
from peftax.core.targets import CLASSIFIERS, OUTPUT_HEADS
from peftax.ops.qtensor import dense
from peftax.weights import experts, forms, names, source
from peftax.weights.forms import PREFIX

CLASSIFIER = "classifier.json"
PEFT_CONFIG, OWN_CONFIG, TENSORS = "adapter_config.json", "peftax_adapter.json", "adapter_model.safetensors"
WRITTEN = (  # what a folder may hold that another replaces
    *(PEFT_CONFIG, OWN_CONFIG, TENSORS, CLASSIFIER, "README.md"),
    *(*source.TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja"),
    *("chat_template.json", "additional_chat_templates", "spiece.model", "sentencepiece.bpe.model"),
)


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


def read_classifier(folder: str | Path) -> dict[str, Any]:
    """{"labels": names, "pooling"} of the head on which an adapter folder stands; empty where it says nothing."""
    file = Path(folder) / CLASSIFIER
    return source.read_json(file) if file.exists() else {}


def count_labels(folder: str | Path) -> int | None:
    """How many labels the head has that an adapter folder holds or says; None where it does neither."""
    if said := read_classifier(folder).get("labels"):
        return len(said)
    if not (file := Path(folder) / TENSORS).exists():
        return None
    opened, ends = source.open(file), tuple(f".{head}.weight" for head in CLASSIFIERS)
    return next((opened.shape(name)[0] for name in opened.names() if name.endswith(ends)), None)


def without_heads(settings: Mapping[str, Any], params: Mapping[str, Any], sites: Sites) -> dict[str, Any]:
    """A folder's settings without the heads, of modules that train whole, that hold nothing here: PEFT names all that a
    classifier's may be called, and a tied one is the table.
    """
    tied = {name for site in sites.values() if site.kind == "head" for name in site.names}
    gone = {head for head in (*CLASSIFIERS, *tied) if head not in params}
    whole = settings.get(methods.WHOLE)
    return {**settings, methods.WHOLE: tuple(m for m in whole if m not in gone)} if whole else dict(settings)


def load(
    folder: str | Path, params: Mapping[str, Any], sites: Sites, *, adapter: str = "default"
) -> tuple[Method, Partition, dict[str, Any]]:
    """(method, partition with the adapter's values, the raw config) of an adapter folder for these base parameters.

    Raises ValueError naming the tensor where one is missing, left over or of another shape.
    """
    folder = Path(folder)
    name, settings, raw = read_config(folder)
    if methods.chained(name):
        return _load_chain(folder, name, raw, params, sites, adapter)
    if "adapter" in methods.defaults(name):
        settings["adapter"] = adapter
    settings = without_heads(settings, params, sites)
    form = getattr(methods.module(name), "HF", None)
    if form is not None and form.held is not None and "peft_type" in raw:
        settings = form.held(settings)
    method = methods.make(name, **settings)
    part = method.init(jax.random.key(0), params, sites)
    tensors = _read_tensors(folder / TENSORS)
    frozen, trainable = (tree.flatten(half) for half in part)
    theta = own_leaves(part, method)
    filled = {path: np.zeros(leaf.shape, np.float32) for path, leaf in trainable.items()}
    fixed: dict[str, np.ndarray] = {}  # frozen leaves that the file holds
    shapes = {name: site.shape for name, (site, _) in sites.by_name().items()}
    for path, leaf in trainable.items():
        if path in theta:
            continue
        for key, index, own in _whole(path, leaf, method, sites):
            filled[path][index] = own.to_tree(_taken(tensors, key, own.tensor_shape, folder))
    for piece in parts(method):
        if piece.call is None:
            continue
        form = _form(piece, method)
        if form is not None and form.opened is not None:
            tensors = form.opened(tensors, method.config)
        slots = list(slots_of(theta, piece, method, sites))
        tensors = experts.unstacked(tensors, slots, piece, form, raw, folder)
        wanted = [s for s in slots if s.path in trainable or forms.key(s, piece, form)]
        for slot, value in _unpack(tensors, wanted, piece, form, trainable, method.config, folder):
            if form is not None and form.check is not None and slot.name:
                try:
                    form.check(slot.leaf, value, shapes[slot.name])
                except ValueError as error:
                    raise ValueError(f"{folder}: {slot.leaf!r} of {slot.name!r}: {error}") from None
            if slot.path in trainable:
                filled[slot.path][slot.index] = value
            else:
                fixed.setdefault(slot.path, np.array(processes.whole(frozen[slot.path])))[slot.index] = value
        for _, copy in _copies(piece, form, sites):
            tensors.pop(copy, None)
    frozen |= {path: jnp.asarray(value) for path, value in fixed.items()}
    for head, path in _tied(trainable, sites).items():
        if np.array_equal(tensors.get(head, ()), filled[path]):
            del tensors[head]
    if raw.get("peft_type") == "LORA" and (tied := _tied(trainable, sites)) and not raw.get("ensure_weight_tying"):
        raise Unsupported(
            f"{folder}: trains {next(iter(tied.values()))!r} apart from the head that shares it (no "
            "ensure_weight_tying); here it is one table: untie the base (tie_word_embeddings false, and a head)"
        )
    _replace_tables(frozen, filled, tensors, sites, folder)
    if tensors:
        first = sorted(tensors)[0]
        raise ValueError(f"{folder}: {first!r} (of {len(tensors)} left over) has no place in this model")
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
    grown: Mapping[str, int] | None = None,
    classifier: Mapping[str, Any] | None = None,
) -> Path:
    """Write the adapter; the folder appears under its name only when it is whole, and replaces an older one.

    Raises FileExistsError where what stands there holds anything else. Of several processes all call it and the first
    writes.

    Args:
      base: the base's path or hub id, for adapter_config.json.
      extra: fields to keep, such as an adapter's own when it is written again.
      tokenizer: laid beside when it changed.
      grown: {path of a table of the base: how many of its rows others have}. Where the adapter does not hold all
        others the table is written whole, as PEFT does.
      classifier: what it says of a classifier's head (`read_classifier`), laid beside.
    """
    folder = Path(folder)
    part = _gathered(part, method, grown or {})
    if not processes.first():
        processes.wait(f"{folder.name} is written")
        return folder
    if folder.exists() and (strange := _strange(folder)):
        raise FileExistsError(
            f"{folder}: holds {strange[0]!r}, which is no file of an adapter and would be lost; remove it or choose "
            "another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.part{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old{os.getpid()}")
    try:
        _write(new, part, method, sites, base, extra or {}, grown or {})
        if tokenizer is not None:
            tokenizer.save_pretrained(str(new))
        if classifier is not None:
            _write_json(new / CLASSIFIER, classifier)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    processes.wait(f"{folder.name} is written")
    return folder


def _strange(folder: Path) -> list[str]:
    """What stands there that `save` does not write; nothing of an adapter's folder, a chain's too, or an empty one."""
    if not folder.is_dir():
        return [folder.name]
    held = {file.name: file for file in sorted(folder.iterdir())}
    if not {PEFT_CONFIG, OWN_CONFIG} & held.keys():
        return list(held)
    known = {*WRITTEN, *(name for name in methods.names() if name in held and not _strange(held[name]))}
    return [name for name in held if name not in known]


def _gathered(part: Partition, method: Method, tables: Iterable[str]) -> Partition:
    """What a folder holds, on this host where other processes have shards of it; the rest of the base as it lies."""

    def gathered(half: Mapping[str, Any], chosen) -> dict[str, Any]:
        flat = tree.flatten(half)
        return tree.unflatten(
            {p: processes.whole(x) if chosen(p) and processes.spread(x) else x for p, x in flat.items()}
        )

    frozen = gathered(part.frozen, lambda path: path in tables or is_theta(path, method))
    return Partition(frozen, gathered(part.trainable, lambda path: True))


def without_peft_type(name: str) -> str | None:
    """What Hugging Face PEFT does not read in this method's folder, as one line; None where it reads it."""
    parts = methods.chained(name)
    lacking = [n for n in parts or (name,) if not hasattr(methods.module(n), "HF")]
    there = f"{', '.join(lacking)}: a {OWN_CONFIG} stands there, which peftax reads"
    if not parts:
        return f"Hugging Face PEFT has no type for {there}" if lacking else None
    line = f"Hugging Face PEFT has no type for several methods in one: {name} is a folder with one of each"
    return f"{line}, and none for {there}" if lacking else f"{line}, which PEFT reads one by one"


def _write(
    new: Path, part: Partition, method: Method, sites: Sites, base, extra: Mapping[str, Any], grown: Mapping[str, int]
) -> None:
    """All files of an adapter, into a folder that is made for them."""
    new.mkdir()
    if methods.chained(method.name):
        for piece, own in _divided(part, method, sites):
            _write(new / piece.name, own, piece, sites, base, extra.get(piece.name, {}), grown)
            grown = {}  # once for all
        more = {k: v for k, v in extra.items() if k not in method.config}
        config = {name: {k: v for k, v in own.items() if k != "adapter"} for name, own in method.config.items()}
        _write_json(new / OWN_CONFIG, {**more, "method": method.name, "config": config})
        return
    frozen, trainable = (tree.flatten(half) for half in part)
    theta = own_leaves(part, method)
    tensors, config = {}, {k: v for k, v in method.config.items() if k != "adapter"}
    stacked: dict[str, str] = {}
    for piece in parts(method):
        if piece.call is None:
            continue
        slots = {(s.name, s.leaf): s for s in slots_of(theta, piece, method, sites)}
        layers: hf.Layers = {}
        for slot in slots.values():
            value = _numbers(theta[slot.path])[slot.index]
            layers.setdefault(slot.name, {})[slot.leaf] = value
        form = _form(piece, method)
        if piece.move is not None and any(map(tree.is_packed, frozen.values())):
            logging.warning(
                "%s: the base was moved and packed again; on the base as others have it the adapter fits up to the "
                "rounding of its bits",
                method.name,
            )
        if form is not None and form.settle is not None:
            layers, config = form.settle({n: v for n, v in layers.items() if n}, config)
        tensors |= _pack(layers, slots, piece, form, trainable, config)
        stacked |= experts.stack(tensors, slots.values(), piece, form)
        if form is not None and form.closed is not None:
            tensors = form.closed(tensors, config)
        tensors |= {copy: tensors[key] for key, copy in _copies(piece, form, sites, written=True)}
    for path, leaf in trainable.items():
        if path not in theta:
            value = _numbers(leaf)
            for key, index, own in _whole(path, leaf, method, sites):
                tensors[key] = own.to_file(value[index])
    for path, others in grown.items():
        tensors |= _table(path, others, frozen, method, sites)
    tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    file, written = _config(method, config, sites, base, extra, stacked)
    if (tied := _tied(trainable, sites)) and "ensure_weight_tying" in written:
        written["ensure_weight_tying"] = True
        tensors |= {head: _numbers(trainable[path]) for head, path in tied.items()}
    save_file(tensors, new / TENSORS, metadata={"format": "pt"})
    _write_json(new / file, written)
    (new / TENSORS).chmod((new / file).stat().st_mode)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


# --- a chain --------------------------------------------------------------------------------------


def _load_chain(folder: Path, name: str, raw, params, sites: Sites, adapter: str):
    """As `load`; the raw config holds each method's own under its name."""
    held, trainable, pieces = dict(params), {}, []
    for own in methods.chained(name):
        methods.module(own)
        method, part, raw[own] = load(folder / own, held, sites, adapter=adapter)
        if method.name != own:
            raise ValueError(f"{folder / own}: holds {method.name!r}, where {folder / OWN_CONFIG} says {own!r}")
        trainable = tree.merge(trainable, part.trainable)
        of_base = {p: x for p, x in tree.flatten(held).items() if p in tree.flatten(part.trainable)}
        held = tree.merge(part.frozen, tree.unflatten(of_base))  # the next may stand where this one trains
        pieces.append(method)
    whole = chain(*pieces, name=name, config={m.name: dict(m.config) for m in pieces})
    trains = tree.flatten(trainable)
    return whole, Partition(tree.split(held, lambda path: path in trains)[0], trainable), raw


def _divided(part: Partition, method: Method, sites: Sites) -> Iterator[tuple[Method, Partition]]:
    """Each method of a chain with the trainable leaves that are its own: under its name, or chosen of the base."""
    left = tree.flatten(part.trainable)
    for name in methods.chained(method.name):
        piece = methods.make(name, **method.config[name])
        choices = [m.chosen for m in parts(piece) if m.chosen is not None]

        def mine(path: str, piece=piece, choices=choices) -> bool:
            return is_theta(path, piece) or (
                not is_theta(path, method) and any(chosen(n, sites) for chosen in choices for n in sites.names(path))
            )

        own = {path: left.pop(path) for path in list(left) if mine(path)}
        yield piece, Partition(part.frozen, tree.unflatten(own))


# --- a method's leaves ----------------------------------------------------------------------------


def _numbers(leaf: Any) -> np.ndarray:
    """A leaf on the host; floating numbers are float32 in every file."""
    value = processes.whole(leaf)
    return value.astype(np.float32) if jnp.issubdtype(value.dtype, jnp.floating) else value


def _form(piece: Method, method: Method) -> hf.Format | None:
    """A part's dialect: its own file's, else the names in that of the method beside which it stands."""
    if piece.name in methods.names():
        return getattr(methods.module(piece.name), "HF", None)
    form = getattr(methods.module(method.name), "HF", None)
    own = ("settle", "pack", "unpack", "opened", "closed", "check", "stacks")  # of the method's own leaves
    return form and dataclasses.replace(form, inside="", **dict.fromkeys(own))


def _pack(layers: hf.Layers, slots, piece: Method, form, trainable, config) -> dict[str, np.ndarray]:
    if form is not None and form.pack is not None:
        return form.pack(layers, config)
    tensors = {}
    for name, leaves in layers.items():
        for leaf, value in leaves.items():
            slot = slots[name, leaf]
            key = forms.key(slot, piece, form)
            if key is not None:
                tensors[key] = forms.to_file(value, slot, piece, form)
            elif slot.path in trainable:
                kind = form.peft_type if form else piece.name
                raise Unsupported(f"{slot.path}: {kind} has no file form here for a {slot.kind} site")
    return tensors


def _unpack(
    tensors: dict[str, np.ndarray], slots, piece: Method, form, trainable, config, folder: Path
) -> Iterator[tuple[Slot, np.ndarray]]:
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
        key = forms.key(slot, piece, form)
        if key is None:
            raise Unsupported(f"{slot.path}: {form.peft_type} has no file form here for a {slot.kind} site")
        if slot.kind == "shared" and slot.path not in trainable and key not in tensors:
            continue  # the file leaves it to its seed
        shape = forms.to_file(np.empty(slot.shape, np.void), slot, piece, form).shape
        yield slot, forms.from_file(_taken(tensors, key, shape, folder), slot, piece, form)


def _copies(piece: Method, form: hf.Format | None, sites: Sites, *, written: bool = False) -> Iterator[tuple[str, str]]:
    """(a table's tensor, its copy at a head tied to the table): all that a file may hold, or those that PEFT writes."""
    if not piece.tied or form is None:
        return
    leaves = {leaf: suffix for leaf, suffix in form.keys["embed"].items() if leaf in piece.axes}
    if written:
        leaves = {leaf: suffix for leaf, suffix in leaves.items() if form.keys.get("head", {}).get(leaf) == suffix}
    tables = {
        s.kernel: s.names[0] for s in sites.values() if s.kind == "embed" and _is_target(piece, s.names[0], s.kind)
    }
    for head in (s for s in sites.values() if s.kind == "head" and s.kernel in tables):
        for suffix in leaves.values():
            yield f"{PREFIX}{tables[head.kernel]}.{suffix}", f"{PREFIX}{head.names[0]}.{suffix}"


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


# --- whole leaves of the base ---------------------------------------------------------------------


def _whole(path: str, leaf: Any, method: Method, sites: Sites) -> Iterator[tuple[str, Any, names.Leaf]]:
    """Where a leaf of the base stands in the file: (tensor name, its part, how it is turned), layer by layer."""
    targeted = {n for s in sites.values() for n in s.names if _is_target(method, n, s.kind)}
    stacked = next(iter(names.walk({path: leaf})))
    form = _form(_holder(path, method, sites), method)
    own, root = (form.inside, form.root) if form else ("", PREFIX)
    for layer, name in enumerate(stacked.names):
        module, last = name.rsplit(".", 1)
        inside = f".{own}" if own else ".base_layer" if module in targeted else ""
        index = (layer,) if stacked.stacked else ()
        shape = leaf.shape[stacked.stacked :]
        yield f"{root}{module}{inside}.{last}", index, names.Leaf(path, (), shape, leaf.dtype, False)


def _holder(path: str, method: Method, sites: Sites) -> Method:
    """The part that trains this leaf of the base."""
    name = sites.names(path)[0]
    return next(m for m in parts(method) if m.chosen and m.chosen(name, sites))


def _tied(trainable: Mapping[str, Any], sites: Sites) -> dict[str, str]:
    """{the name under which PEFT repeats it as the head's: path} of the trained table that a head shares."""
    heads = [site for site in sites.values() if site.kind == "head" and site.kernel in trainable]
    return {f"{PREFIX}{head.names[0]}.weight": head.kernel for head in heads}


def _is_target(method: Method, name: str, kind: str) -> bool:
    return any(m.settings and m.settings(name, kind) is not None for m in parts(method))


def _table(path: str, others: int, frozen: Mapping[str, Any], method: Method, sites: Sites) -> dict[str, np.ndarray]:
    """A table that has more rows than others', whole; nothing where the adapter holds all of these."""
    if path not in frozen:
        return {}  # it trains whole
    (leaf,) = names.walk({path: frozen[path]})
    module, inside = leaf.names[0].rpartition(".")[0], ""
    kind = next(s.kind for s in sites.values() if s.kernel == path and s.kind != "head")
    for part in parts(method):
        settings = part.settings(module, kind) if part.settings else None
        if settings is None:
            continue
        if part.tied and set(range(others, leaf.tensor_shape[0])) <= set(settings["tokens"]):
            return {}
        inside = ".base_layer" if part.name in methods.names() else ".token_adapter.base_layer"
    return {f"{PREFIX}{module}{inside}.weight": leaf.to_file(_numbers(frozen[path]))}


def _replace_tables(
    frozen: dict[str, Any], filled: Mapping[str, Any], tensors: dict[str, np.ndarray], sites: Sites, folder: Path
) -> None:
    """Take whole tables out of the tensors into the base: a target's, or one of another size than others'."""
    heads = {}
    for site in sites.values():
        if site.stack or (site.kind not in ("embed", "head") and site.path.rpartition("/")[2] not in OUTPUT_HEADS):
            continue
        for inside in ("", ".base_layer", ".token_adapter.base_layer"):
            key = f"{PREFIX}{site.names[0]}{inside}.weight"
            if key not in tensors:
                continue
            tensor = tensors.pop(key)
            if site.kind == "head":
                heads[key] = site.kernel, tensor
                continue
            (leaf,) = names.walk({site.kernel: frozen[site.kernel]})
            if tensor.shape != leaf.tensor_shape:
                raise ValueError(
                    f"{folder}: {key!r} {tensor.shape} fits no table of this base, {leaf.tensor_shape}; was its "
                    "vocabulary resized? Lay its tokenizer into the folder, or open the base with model.new_tokens"
                )
            frozen[site.kernel] = jnp.asarray(leaf.to_tree(tensor), frozen[site.kernel].dtype)
    for key, (path, tensor) in heads.items():
        if not _same_table(tensor, filled.get(path, frozen.get(path))):
            raise Unsupported(
                f"{folder}: {key!r} is not the table {path!r} that the head shares; here it is one table: untie the "
                "base (tie_word_embeddings false, and a head)"
            )


def _same_table(tensor: np.ndarray, table: Any) -> bool:
    """Is it the table once more, as far as the narrower of the two tells?"""
    if tree.is_packed(table):
        tensor, table = dense(quantization.like(jnp.asarray(tensor), table)), dense(table)
    tensor, table = np.asarray(tensor), processes.whole(table)
    return np.array_equal(tensor.astype(table.dtype), table) or np.array_equal(tensor, table.astype(tensor.dtype))


def _config(
    method: Method, own: Mapping[str, Any], sites: Sites, base, extra, stacked: Mapping[str, str]
) -> tuple[str, dict[str, Any]]:
    """(file name, its JSON); stacked: parameter -> one of its experts, for those that stand in the file as one."""
    form = _form(method, method)
    if form is None:
        there = extra.get("base_model_name_or_path") if base is None else base
        return OWN_CONFIG, {**extra, "method": method.name, "config": dict(own), "base_model_name_or_path": there}
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
    if stacked and hf.version(extra) < hf.version(made := {"peft_version": form.stacks.since}):
        fields |= made  # of square kernels the version alone tells how they lie
    if base is not None or "base_model_name_or_path" not in extra:
        fields["base_model_name_or_path"] = base
    whole = own.get("modules_to_save") or ()
    if whole:
        fields["modules_to_save"] = list(whole)
    task = "SEQ_CLS" if set(whole) & set(CLASSIFIERS) else "CAUSAL_LM"
    always = {"task_type": task, "revision": None, "auto_mapping": None}
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
