"""How a method's leaves and settings stand in a Hugging Face PEFT adapter folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


class Unsupported(ValueError):
    """The adapter asks for what this method does not do; the message says what and the nearest that is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """One method's dialect.

    peft_type: the value in adapter_config.json.
    keys:      kind of site -> leaf -> suffix of the tensor's name; every 2-D leaf is transposed in the file.
    read:      adapter_config.json -> the method's keyword arguments; raises Unsupported.
    write:     keyword arguments -> fields of adapter_config.json.
    matches:   does this config belong here? Types that several files share are told apart by it.
    """

    peft_type: str
    keys: Mapping[str, Mapping[str, str]]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Mapping[str, Any]], dict[str, Any]]
    matches: Callable[[Mapping[str, Any]], bool] = lambda config: True
