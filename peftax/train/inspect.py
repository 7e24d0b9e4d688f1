"""What a config would train, shown before it trains: a batch with its loss mask, sites, counts, memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftax import sharding, weights
from peftax.core import sites as core_sites
from peftax.core import tree
from peftax.ops.attention.mesh import splits
from peftax.train import loop, memory, setup


def show(config: Mapping[str, Any], *, rows: int = 4, console: Console | None = None) -> memory.Need:
    """Print it all. Data and tokenizer are opened; of the weights only names and shapes are read."""
    console = console or Console(highlight=False)
    base = setup.outline(**config["model"], mesh=config["mesh"])
    weights.check(base.unread, base.params)
    run = setup.sketch(base, config["method"])
    setup.check_mesh(base, config, run.method)
    c = config["train"]
    batches = setup.train_batches(base, config["data"], batch_size=c["batch_size"], accumulate=c["accumulate"])
    setup.valid_rows(base, config["data"])
    batch = {k: v.reshape(-1, v.shape[-1]) for k, v in next(batches).items()}
    show_batch(batch, base.tokenizer, rows, console)
    show_sites(run, console)
    loop.show(run, console)
    show_mesh(run, console)
    need = memory.estimate(run, config)
    there = memory.free(base)
    memory.show(need, there, console)
    if there is not None and need.total > there:
        console.print(Text(f"too much. {'; or '.join(memory.changes(need, there, config))}"))
    return need


def show_batch(batch: Mapping[str, np.ndarray], tokenizer: Any, rows: int, console: Console) -> None:
    """The text of a batch's rows, example by example; what the loss counts stands in ⟦ ⟧."""
    n, length = batch["tokens"].shape
    console.print(Text(f"the first batch: {_plural(n, 'row')} of {length} tokens; the loss counts what stands in ⟦ ⟧"))
    for r in range(min(rows, n)):
        row = {k: v[r] for k, v in batch.items()}
        examples = int(row["segment_ids"].max(initial=0))
        used, counted = int((row["segment_ids"] > 0).sum()), int((row["weights"] > 0).sum())
        console.print(
            Text(f"\nrow {r}: {_plural(examples, 'example')}, {used} of {length} places, {counted} tokens count")
        )
        for segment in range(1, examples + 1):
            at = np.flatnonzero(row["segment_ids"] == segment)
            learned = counts(row["weights"][at])
            console.print(
                Text(f"--- example {segment}: tokens {at[0]} to {at[-1]}, {learned.sum()} count ---", style="dim")
            )
            console.print(marked(row["tokens"][at], learned, tokenizer), soft_wrap=True)
    if rows < n:
        console.print(Text(f"\n... and {_plural(n - rows, 'more row')}: --rows={n} shows all"))
    console.print()


def _plural(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def counts(weights: np.ndarray) -> np.ndarray:
    """Which tokens of one example the loss counts; `weights` are of the targets, one place earlier."""
    return np.concatenate([[False], weights[:-1] > 0])


def marked(tokens: np.ndarray, learned: np.ndarray, tokenizer: Any) -> Text:
    """An example's text with ⟦ ⟧ around every stretch that counts."""
    text = Text()
    borders = [0, *(np.flatnonzero(np.diff(learned)) + 1), len(tokens)]
    for start, end in zip(borders, borders[1:], strict=False):
        words = tokenizer.decode([int(t) for t in tokens[start:end]])
        text.append(f"⟦{words}⟧" if learned[start] else words, style="bold green" if learned[start] else "")
    return text


def show_sites(run: setup.Run, console: Console) -> None:
    """The places a method may touch, all layers of one in a line: first those it does, then the others."""
    table = Table(title=f"sites of {run.base.path.name}", title_justify="left")
    table.add_column("site")
    table.add_column("kind")
    table.add_column("in x out", justify="right")
    table.add_column("chosen", justify="right")
    trained = _trained(run)
    sites = run.base.sites
    blocks = [b for b in sites.blocks.values() if b.path in trained and b.path not in sites]
    groups: dict[tuple[str, str, str], list[int]] = {}
    for place in (*sites.values(), *blocks):
        key = (place.template, place.kind, "x".join(map(str, place.shape)))
        chosen = groups.setdefault(key, [0, 0])
        chosen[0] += len(trained.get(place.path, ()))
        chosen[1] += len(place.names)
    for hit in (True, False):
        for (template, kind, shape), (chosen, layers) in groups.items():
            if bool(chosen) == hit:
                table.add_row(template, kind, shape, f"{chosen} of {layers}", style="" if hit else "dim")
        table.add_section()
    console.print(table)


def show_mesh(run: setup.Run, console: Console) -> None:
    """How the leaves lie on more than one device, all layers of one in a line, and what had to stay whole."""
    mesh = run.base.mesh
    if mesh.size == 1:
        return
    over = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    table = Table(title=f"on a mesh of {over}", title_justify="left")
    table.add_column("leaf", overflow="fold")
    for column in ("leaves", "shape", "lies over", "bytes a device", "whole over"):
        table.add_column(column, justify="right")
    for half in run.part:
        for kind in sharding.report(half, run.base.places(half, run.method), run.base.sites, run.base.specs, mesh):
            axes = ", ".join("-" if a is None else " x ".join(jax.tree.leaves(a)) for a in kind.spec)
            shape = "x".join(map(str, kind.shape))
            table.add_row(kind.path, str(kind.leaves), shape, axes, memory.size(kind.bytes), ", ".join(kind.whole))
        table.add_section()
    console.print(table)
    heads, tensor = run.base.config.get("num_attention_heads"), mesh.shape["tensor"]
    if heads and tensor > 1:
        kv = run.base.config.get("num_key_value_heads") or heads
        split, split_kv = splits(heads, kv, tensor)
        own, own_kv = heads // tensor if split else heads, kv // tensor if split_kv else 1 if split else kv
        told = f"a device has {own} of {heads} heads and {own_kv} of {kv} key heads"
        console.print(Text(f"attention over tensor {tensor}: {told}"))


def _trained(run: setup.Run) -> dict[str, set[str]]:
    """{path of a site or block: the names of its layers in which something trains}."""
    found: dict[str, set[str]] = {}
    own = tree.flatten(run.base.params)
    for path in tree.flatten(run.part.trainable):
        if path in own:
            for site in run.base.sites.values():
                if path in (site.kernel, site.bias):
                    found.setdefault(site.path, set()).update(site.names)
            continue
        place, piece, _ = core_sites.theta_of(path, run.method, run.base.sites)
        if place is not None:  # leaves that all sites share have none
            names = [n for n in place.names if piece.settings and piece.settings(n, place.kind) is not None]
            found.setdefault(place.path, set()).update(names)
    return found
