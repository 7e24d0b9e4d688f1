"""What adapters of finished runs come to on data that training never saw: test, and whatever is asked for later."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftax.core.method import chain
from peftax.data import packing
from peftax.data import source as data_source
from peftax.train import evaluate, setup


class Reader:
    """One base, whose adapters are read one after the other.

    Args:
      config: of a run; runs that agree in `model` and `data` share a reader.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.data = config["data"]
        self.base = setup.outline(**config["model"], mesh=config["mesh"]).load()
        self._rows: dict[str, packing.Rows] = {}
        self._applies: dict[str, Any] = {}

    def test(self, adapter: str | Path) -> dict[str, float]:
        """{"nll", "tokens", and "accuracy" of a classifier} of an adapter folder on `config.data`'s test."""
        if "" not in self._rows:
            rows = setup.held_out(self.base, self.data, "test")
            if rows is None:
                raise ValueError("config.data.test is empty: there is no test to read")
            self._rows[""] = rows
        return self._nll(adapter, self._rows[""])

    def measure(self, source: str, adapter: str | Path | None = None) -> dict[str, float]:
        """The same on another source, see `other`; without an adapter of the untouched base."""
        if source not in self._rows:
            self._rows[source] = other(self.base, self.data, source)
        return self._nll(adapter, self._rows[source])

    def _nll(self, adapter: str | Path | None, rows: packing.Rows) -> dict[str, float]:
        if adapter is None:
            apply, params = self.base.inject(chain()), self.base.params
        else:
            run = setup.attach(self.base, adapter)
            apply, params = self._applies.setdefault(_kind(Path(adapter)), run.apply), run.params
        found = evaluate.nll(apply, params, rows, hits=bool(self.base.labels), at=self.base.rows)
        return {key: found[key] for key in ("nll", "accuracy", "tokens") if key in found}


def _kind(adapter: Path) -> str:
    """Adapters that differ in their numbers alone share a program."""
    return "".join(file.read_text() for file in sorted(adapter.rglob("*.json")))


def other(base: setup.Base, data: Mapping[str, Any], source: str) -> packing.Rows:
    """The packed rows of "SOURCE" or "SOURCE#SPLIT": a task, a file, a hub name.

    Rows hold messages, or prompt and completion, or `text`, all of which counts. What is longer than the context is
    cut.
    """
    where, _, split = source.partition("#")
    more: dict[str, Any] = {"task": None, "source": where, "chat_template": data["chat_template"]}
    if is_task(where):
        more, split = {"task": where}, split or "test"
    else:
        split = split or ("train" if Path(where).exists() else "test")
        rows = data_source.load(where, split=split)
        if not base.labels and "text" in rows[0] and not {"messages", "prompt"} & set(rows[0]):
            rows = [row for row in rows if row["text"] and row["text"].strip()]
            more |= {"prompt": "", "completion": "{text}"}
        more["source"] = rows
    examples = setup.examples(base, split, length=data["length"], policy="truncate", **more)
    rows = packing.pack(examples, data["length"])
    rows.pop("groups", None)
    return rows


def is_task(name: str) -> bool:
    """Is it a file of peftax/data with `examples(split)`?"""
    if not name.isidentifier() or importlib.util.find_spec(f"peftax.data.{name}") is None:
        return False
    return hasattr(importlib.import_module(f"peftax.data.{name}"), "examples")
