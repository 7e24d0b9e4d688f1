"""One paper, one file. A file here whose function bears its name is a method; there is no other list.

"prefix+adapter" is the chain of these two, with each one's settings under its name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from peftax.core import lift, tree
from peftax.core.hf import Unsupported
from peftax.core.method import Method, chain

WHOLE = "modules_to_save"


@functools.cache
def names() -> tuple[str, ...]:
    """Every method that this folder holds."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg))


def module(name: str) -> ModuleType:
    """The file of a method. Raises ValueError naming the nearest where there is none."""
    if name not in names():
        raise ValueError(f"method {name!r} does not exist; the nearest: {tree.nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def chained(name: str) -> tuple[str, ...]:
    """The methods that a chain's name lists; none where it is one method's. Raises ValueError where one comes twice."""
    names = tuple(name.split("+")) if "+" in name else ()
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise ValueError(f"method {name!r}: {twice!r} comes twice; its leaves would lie in one place")
    return names


def defaults(name: str) -> dict:
    """The keyword arguments of a method with their default values; of a chain, {method: these}."""
    if parts := chained(name):
        return {part: defaults(part) for part in parts}
    function = getattr(module(name), name)
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


def make(name: str, **settings) -> Method:
    """The method `name`, or the chain. A key it does not know raises TypeError naming the nearest.

    modules_to_save: suffixes of modules that train whole; also of methods without a setting of that name, and of a
    chain, whose first method holds them.
    """
    parts, known = chained(name), defaults(name)
    if isinstance(settings.get(WHOLE), str):
        raise ValueError(f"{WHOLE}: {settings[WHOLE]!r} is one string; give a list of names")
    whole = tuple(settings.get(WHOLE) or ()) if WHOLE not in known else ()
    if whole and parts:
        first = settings.get(parts[0], {})
        settings[parts[0]] = {**first, WHOLE: (*(first.get(WHOLE) or ()), *whole)}
    if WHOLE not in known:
        settings.pop(WHOLE, None)
    for key in settings:
        if key not in known:
            raise TypeError(f"{name}: no setting {key!r}; the nearest: {tree.nearest(key, known)}")
    if parts:
        for part, own in settings.items():
            if not isinstance(own, Mapping):
                key, value = next(iter(known[part].items()))
                raise TypeError(f"{name}: {part} is {own!r}; want its settings, as {{{key!r}: {value!r}}}")
        made = [make(part, **settings.get(part, {})) for part in parts]
        return chain(*made, name=name, config={m.name: dict(m.config) for m in made})
    made = getattr(module(name), name)(**settings)
    return lift.with_modules(made, whole) if whole else made


def from_peft(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(method, its settings) of a Hugging Face adapter_config.json. Raises Unsupported naming the nearest."""
    kind = config.get("peft_type")
    formats = {name: module(name).HF for name in names() if hasattr(module(name), "HF")}
    for name, form in formats.items():
        if form.peft_type == kind and form.matches(config):
            return name, {**({WHOLE: tuple(config[WHOLE])} if config.get(WHOLE) else {}), **form.read(config)}
    known = sorted({form.peft_type for form in formats.values()})
    raise Unsupported(
        f"peft_type {kind!r} is not supported; supported: {', '.join(known)}; "
        f"the nearest: {tree.nearest(str(kind), known, 1)}"
    )
