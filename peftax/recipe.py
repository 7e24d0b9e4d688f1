"""Recipes: a shipped config by name or a file by path, with overrides applied left to right."""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from peftax import methods
from peftax.core import tree


def load(
    name_or_path: str, overrides: Sequence[tuple[str, str]] = (), *, on: str | None = None
) -> ml_collections.ConfigDict:
    """The config of a recipe with the method's own defaults filled in and `("method.rank", "8")` pairs applied
    in order. "papers/guanaco_7b:repo" is the variant "repo" of a recipe that has some.

    Choosing another method installs its defaults and drops every key of the one before.

    Args:
      on: one of the recipe's `machines`; its pairs come first.
    """
    config = _config(name_or_path)
    if on is not None:
        known = machines(name_or_path)
        if on not in known:
            there = f"it names {', '.join(known)}" if known else "it names none"
            raise ValueError(f"recipe {name_or_path} does not say how to run on {on!r}; {there}")
        overrides = (*known[on], *overrides)
    config.unlock()
    given = config.method.to_dict()
    config.method = ml_collections.ConfigDict(_settings(given.pop("name"), given))
    for key, text in overrides:
        override(config, key, text)
    config.lock()
    return config


def machines(name_or_path: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """{machine that a recipe names: the pairs that it takes there}."""
    return dict(getattr(_module(name_or_path), "MACHINES", {}))


def sweep_of(name_or_path: str) -> Callable[[Callable[[Mapping[str, Any]], None]], None] | None:
    """A recipe's `sweep(add)`, if it has one."""
    return getattr(_module(name_or_path), "sweep", None)


def override(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    """Set one dotted key from its text. Raises KeyError naming the nearest key, ValueError for a wrong type."""
    if key == "method.name":
        config.method = ml_collections.ConfigDict(_settings(text, {}))
        return
    known = flat(config)
    if key not in known:
        raise KeyError(f"config has no key {key!r}; the nearest: {tree.nearest(key, known)}")
    *path, last = key.split(".")
    at = config
    for part in path:
        at = at[part]
    old = at[last]
    value = parse(text, old, key)
    with at.ignore_type():
        at[last] = value


def parse(text: str, old: Any, key: str) -> Any:
    """Text to a value that may stand in for `old`."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        words = {} if isinstance(old, str) else {"true": True, "false": False, "none": None}  # "none" may be a choice
        value = words.get(text.lower(), text)
    if isinstance(old, str) and isinstance(value, bool | int | float):
        return text
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wrong = (
        isinstance(old, bool) != isinstance(value, bool)
        if isinstance(old, bool)
        else isinstance(old, int | float) and not isinstance(value, int | float | None)
    )
    if wrong or (isinstance(old, int) and isinstance(value, float)):
        raise ValueError(f"config.{key}={text!r}: want a value like {old!r} ({type(old).__name__})")
    if isinstance(old, tuple) and isinstance(value, str) and not key.startswith("method."):  # there one may stand alone
        raise ValueError(f"config.{key}={text!r}: want several in brackets, a comma behind each: ({value!r},)")
    if isinstance(value, dict):
        return tuple(value.items())  # a ConfigDict takes no key with a dot
    return tuple(value) if isinstance(value, list) else value


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.steps": 100, ...}"""
    out = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def shipped() -> list[str]:
    """The names of the recipes that travel with the package."""
    folders = {"": _configs(), "papers/": importlib.import_module("peftax.configs.papers")}
    found = (f"{at}{m.name}" for at, folder in folders.items() for m in pkgutil.iter_modules(folder.__path__))
    return sorted(name for name in found if name not in ("default", "qlora", "papers"))


def variants(name_or_path: str) -> tuple[str, ...]:
    """The variants of a recipe, such as ("paper", "repo"), its own choice first; none where it has one form."""
    return tuple(getattr(_module(name_or_path), "VARIANTS", ()))


def _config(name_or_path: str) -> ml_collections.ConfigDict:
    name, variant = _split(name_or_path)
    if variant is None:
        return _module(name).get_config()
    if variant not in variants(name):
        there = f"it has {', '.join(variants(name))}" if variants(name) else "it has none"
        raise ValueError(f"recipe {name} has no variant {variant!r}; {there}")
    return _module(name).get_config(variant)


def _split(name_or_path: str) -> tuple[str, str | None]:
    name, colon, variant = name_or_path.rpartition(":")
    return (name, variant) if colon and "/" not in variant and "\\" not in variant else (name_or_path, None)


def _settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    known = methods.defaults(name)
    for key in given:
        if key not in known:
            raise KeyError(f"method {name} has no setting {key!r}; the nearest: {tree.nearest(key, known)}")
    settings = {"name": name, **known, **given}
    for part in methods.chained(name):
        settings[part] = _settings(part, given.get(part, {}))
        del settings[part]["name"]
    return settings


def _configs():
    return importlib.import_module("peftax.configs")


def _module(name_or_path: str):
    name_or_path, _ = _split(name_or_path)
    path = Path(name_or_path)
    if path.suffix == ".py":
        if not path.exists():
            raise FileNotFoundError(f"no recipe file {name_or_path}")
        spec = importlib.util.spec_from_loader(path.stem, _Source(path.stem, str(path)))
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except SyntaxError as error:
            raise ValueError(f"recipe {error.filename or path}, line {error.lineno}: {error.msg}") from error
        return module
    if name_or_path not in (*shipped(), "default"):
        raise ValueError(f"no recipe {name_or_path!r}; shipped: {', '.join(shipped())}; or give the path of a .py file")
    return importlib.import_module(f"peftax.configs.{name_or_path.replace('/', '.')}")


class _Source(importlib.machinery.SourceFileLoader):
    """Without bytecode, which would lie beside a recipe and be taken for it when both are of one second and size."""

    def get_code(self, fullname: str):
        return self.source_to_code(self.get_data(self.path), self.path)
