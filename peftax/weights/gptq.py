"""GPTQ checkpoints of four bits (AutoGPTQ, GPTQModel), and what AWQ's and compressed-tensors' share with them.

  w[n, k] = scale[k // group, n] * (code[k, n] - zero[k // group, n])        code, zero in 0..15

Eight codes lie in an int32 word, the first in its lowest four bits; a format says along which axis and in what order.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peftax.ops.qtensor import QTensor
from peftax.weights.source import Source

WORD = 8  # codes in an int32


@dataclasses.dataclass(frozen=True)
class Layout:
    """A weight's K inputs and N outputs, how many inputs share a scale, and how many groups they make."""

    k: int
    n: int
    group: int

    @property
    def groups(self) -> int:
        return -(-self.k // self.group)


class Int4(Source):
    """A Hugging Face checkpoint whose linear weights are unsigned four-bit codes; all else passes through.

    A quantized module's tensors stand as one, "….weight" [N, K]. `read` computes s * (q - z) in f32. `read_packed` is
    "q4_1" with f32 `scale` = s and `low` = -s * z, or "q4_0" where every z is 8. For s of f16 or bf16 the products and
    their sum are exact in f32, so that `dense` gives the numbers of `read`; an f16 `low` would round. For s of f32,
    which compressed-tensors alone writes, that holds of "q4_0"; "q4_1" rounds twice where `read` rounds once.

    Args:
      inner: the open files.
    """

    method: str  # the quant_method in config.json
    parts: tuple[str, ...]  # what a quantized module's tensors are called; the first has the codes, the second scales
    optional: tuple[str, ...] = ()  # those a module may lack

    def __init__(self, inner: Source):
        self.inner, self.path = inner, inner.path
        self.settings: Mapping[str, Any] = inner.config.get("quantization_config") or {}
        if (method := self.settings.get("quant_method")) != self.method:
            raise ValueError(f"{self.path}: quant_method is {method!r}, not {self.method!r}")
        self._check_settings()
        self._held = set(inner.names())
        self._names = self._logical()
        self._layouts: dict[str, Layout] = {}

    @abc.abstractmethod
    def _check_settings(self) -> None:
        """Raise unless quantization_config says a layout that is read."""

    @abc.abstractmethod
    def _find_layout(self, module: str) -> Layout:
        """A module's sizes; every tensor of it is held against them."""

    @abc.abstractmethod
    def _codes(self, module: str, k: range, n: range) -> np.ndarray:
        """uint8 [k, n] in 0..15."""

    @abc.abstractmethod
    def _zeros(self, module: str, groups: range, n: range) -> np.ndarray | None:
        """f32 [groups, n]; None where all are 8."""

    def _scales(self, module: str, groups: range, n: range) -> np.ndarray:
        """f32 [groups, n]."""
        index = (slice(groups.start, groups.stop), slice(n.start, n.stop))
        return self.inner.read(f"{module}.{self.parts[1]}", index=index).astype(np.float32)

    def _logical(self) -> dict[str, str | None]:
        """{name: its module where it is quantized, else None}, in the files' order."""
        modules = {name.removesuffix(f".{self.parts[0]}") for name in self._held if name.endswith(f".{self.parts[0]}")}
        if not modules:
            raise ValueError(f"{self.path}: config.json says {self.method}, but no tensor is called ….{self.parts[0]}")
        for module in sorted(modules):
            lacks = [part for part in self.parts if f"{module}.{part}" not in self._held and part not in self.optional]
            if lacks:
                raise ValueError(f"{self.path}: tensor {f'{module}.{lacks[0]}'!r} is missing; fetch the files again")
            if f"{module}.weight" in self._held:
                raise ValueError(f"{self.path}: holds both {f'{module}.weight'!r} and its {self.parts[0]}; keep one")
        names: dict[str, str | None] = {}
        for name in self.inner.names():
            module, _, part = name.rpartition(".")
            if module not in modules or part not in self.parts:
                names[name] = None
            elif part == self.parts[0]:
                names[f"{module}.weight"] = module
        return names

    def _module(self, name: str) -> str | None:
        if name not in self._names:
            raise self._missing(name)
        return self._names[name]

    def _layout(self, module: str) -> Layout:
        if module not in self._layouts:
            self._layouts[module] = self._find_layout(module)
        return self._layouts[module]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.inner.config

    def tokenizer(self) -> Any | None:
        return self.inner.tokenizer()

    def generation(self) -> Mapping[str, Any]:
        return self.inner.generation()

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        if (module := self._module(name)) is None:
            return self.inner.shape(name)
        at = self._layout(module)
        return (at.n, at.k)

    def dtype(self, name: str) -> np.dtype:
        return self.inner.dtype(name) if self._module(name) is None else np.dtype(np.float32)

    def read(self, name: str, *, index: tuple[slice, ...] | None = None) -> np.ndarray:
        if (module := self._module(name)) is None:
            return self.inner.read(name, index=index)
        at = self._layout(module)
        rows, columns = index or (slice(None), slice(None))
        n, k = range(*rows.indices(at.n)), range(*columns.indices(at.k))
        groups = range(k.start // at.group, -(-k.stop // at.group))
        number = np.arange(k.start, k.stop) // at.group - groups.start
        zeros = self._zeros(module, groups, n)
        w = self._codes(module, k, n).astype(np.float32)
        w -= np.float32(8) if zeros is None else zeros[number]
        w *= self._scales(module, groups, n)[number]
        return w.T

    def packed(self, name: str) -> str | None:
        """The QTensor's format; None for numbers, and where K ends inside a group or a byte."""
        if (module := self._module(name)) is None:
            return None
        at = self._layout(module)
        return None if at.k % at.group or at.k % 2 else self._format(module)

    def _format(self, module: str) -> str:
        return "q4_1"

    def read_packed(self, name: str) -> QTensor:
        """The same weight [K, N] as it lies, in numpy arrays."""
        module, fmt = self._module(name), self.packed(name)
        if module is None or fmt is None:
            raise ValueError(f"{self.path}: tensor {name!r} is not held as a QTensor can hold it; `read` gives numbers")
        at = self._layout(module)
        k, n, groups = range(at.k), range(at.n), range(at.groups)
        codes = self._codes(module, k, n)
        scale, zeros = self._scales(module, groups, n), self._zeros(module, groups, n)
        low = None if zeros is None else -(scale * zeros)[:, None]
        return QTensor(codes[0::2] | codes[1::2] << 4, scale[:, None], low, fmt=fmt)

    def _block(self, name: str, axes: tuple[range, range], axis: int, nibbles: Sequence[int] = range(WORD)) -> Any:
        """The codes uint8 in a block of a tensor whose words lie along `axis`; its code j is nibble nibbles[j]."""
        first = axes[axis].start // WORD
        spans = [slice(span.start, span.stop) for span in axes]
        spans[axis] = slice(first, -(-axes[axis].stop // WORD))
        words = self.inner.read(name, index=tuple(spans)).view(np.uint32)
        codes = np.stack([(words >> np.uint32(4 * i)).astype(np.uint8) & 15 for i in nibbles], axis=axis + 1)
        codes = codes.reshape([WORD * n if i == axis else n for i, n in enumerate(words.shape)])
        start = axes[axis].start - WORD * first
        return codes[(slice(None),) * axis + (slice(start, start + len(axes[axis])),)]

    def _expect(self, name: str, shape: tuple[int, ...], kind: type, why: str) -> None:
        """Raise unless a tensor has the shape that the others and the config ask for, and words or floats."""
        have, dtype = self.inner.shape(name), self.inner.dtype(name)
        if have != shape:
            raise ValueError(f"{self.path}: tensor {name!r} has shape {have}, want {shape} ({why})")
        # numpy sorts bfloat16 under "V"
        if not (dtype.kind in "fV" if kind is float else dtype == np.int32):
            raise ValueError(f"{self.path}: tensor {name!r} is {dtype}, want {'floats' if kind is float else 'int32'}")

    def _sizes(self, name: str) -> tuple[int, int]:
        shape = self.inner.shape(name)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{self.path}: tensor {name!r} has shape {shape}, want two axes (a linear module's codes)")
        return shape

    def _group(self, k: int) -> int:
        """The config's group_size; -1: one group."""
        size = self.settings.get("group_size", -1)
        return k if size == -1 else min(size, k)

    def _check_bits(self, bits: Any, where: str = "") -> None:
        if bits != 4:
            raise ValueError(f"{self.path}: {where}{self.method} of {bits} bits is not read; 4 is: use float weights")

    def _check_group_size(self) -> None:
        size = self.settings.get("group_size", -1)
        if not isinstance(size, int) or size < 1 and size != -1:
            raise ValueError(f"{self.path}: group_size in config.json is {size!r}, want a number > 0, or -1 for all")

    def _check_order(self, name: str, at: Layout) -> None:
        """Raise if a tensor [K] that numbers the rows' groups does not do so in order."""
        if not np.array_equal(self.inner.read(name), np.arange(at.k) // at.group):
            raise ValueError(
                f"{self.path}: tensor {name!r} scatters the groups over the rows (desc_act, act-order), which is not "
                "read; take a checkpoint made without it, or the float weights"
            )


class Gptq(Int4):
    """qweight int32 [K/8, N], scales [K/g, N], qzeros int32 [K/g, N/8] of z - 1 (of z in "gptq_v2"), g_idx [K].

    Source: AutoGPTQ, nn_modules/qlinear/qlinear_cuda_old.py; GPTQModel, utils/model.py, for "gptq_v2".
    """

    method = "gptq"
    parts = ("qweight", "scales", "qzeros", "g_idx")
    optional = ("g_idx",)

    @property
    def kind(self) -> str:
        """checkpoint_format in config.json: "gptq" stores z - 1, "gptq_v2" z."""
        return str(self.settings.get("checkpoint_format") or self.settings.get("format") or "gptq").lower()

    def _check_settings(self) -> None:
        self._check_bits(self.settings.get("bits"))
        self._check_group_size()
        kind = "marlin" if self.settings.get("is_marlin_format") else self.kind
        if kind not in ("gptq", "gptq_v2"):
            raise ValueError(f"{self.path}: GPTQ laid out as {kind!r} is not read; 'gptq' and 'gptq_v2' are")
        if (word := self.settings.get("pack_dtype", "int32")) != "int32":
            raise ValueError(f"{self.path}: GPTQ packed in {word} words is not read; int32 ones are")

    def _find_layout(self, module: str) -> Layout:
        rows, n = self._sizes(f"{module}.qweight")
        at = Layout(WORD * rows, n, self._group(WORD * rows))
        why = f"K {at.k}, N {n}, group_size {self.settings.get('group_size', -1)}"
        self._expect(f"{module}.qweight", (rows, n), int, why)
        self._expect(f"{module}.scales", (at.groups, n), float, why)
        self._expect(f"{module}.qzeros", (at.groups, -(-n // WORD)), int, why)
        if (name := f"{module}.g_idx") in self._held:
            self._expect(name, (at.k,), int, f"four bits a code in {rows} words")
            self._check_order(name, at)
        return at

    def _codes(self, module: str, k: range, n: range) -> np.ndarray:
        return self._block(f"{module}.qweight", (k, n), 0)

    def _zeros(self, module: str, groups: range, n: range) -> np.ndarray:
        name = f"{module}.qzeros"
        stored = self._block(name, (groups, n), 1)
        if self.kind == "gptq" and (stored == 15).any():
            raise ValueError(
                f"{self.path}: tensor {name!r} holds 15 for z - 1, by which writers mean a z of 0, of 16 or a borrow; "
                "convert it to checkpoint_format 'gptq_v2', or use the float weights"
            )
        zeros = stored + (self.kind == "gptq")
        if self.settings.get("sym") is True and not self.settings.get("dynamic") and (zeros != 8).any():
            # checkpoints that say "gptq" and store z are about; every weight would be off by one scale
            raise ValueError(
                f"{self.path}: tensor {name!r} gives a zero point of {zeros[zeros != 8][0]} where sym, in config.json, "
                f"asks for 8; is its checkpoint_format ({self.kind!r}) right?"
            )
        return zeros.astype(np.float32)
