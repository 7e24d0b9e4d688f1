"""Hugging Face checkpoints of bitsandbytes' 4-bit weights: read as they lie there, written back byte for byte.

A weight "….weight" [N, K] is a column of bytes with, beside it,

  .absmax                          f32 [blocks], or uint8 under double quantization
  .quant_map                       f32 [16], the levels
  .nested_absmax                   f32 [ceil(blocks / 256)]       under double quantization
  .nested_quant_map                f32 [256]                      under double quantization
  .quant_state.bitsandbytes__nf4   uint8, JSON: format, block size, type, shape, the offset of the nested scales
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from peftax.ops.qtensor import GROUPS, LEVELS, NESTED, QTensor, dynamic_levels
from peftax.weights.source import Source

FORMATS = ("nf4", "fp4")
TYPES = ("float32", "bfloat16", "float16")
STATE = "quant_state.bitsandbytes__"
BESIDE = re.compile(rf"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|{re.escape(STATE)}.*)")


@dataclasses.dataclass(frozen=True)
class State:
    """What is said beside a packed weight; its scales stay in the file."""

    fmt: str
    block: int
    dtype: np.dtype
    shape: tuple[int, ...]  # torch's, [N, K]
    levels: np.ndarray
    nested: int = 0  # the block size of the scales; 0: they are plain
    nested_levels: np.ndarray | None = None
    offset: np.float32 = np.float32(0)

    @property
    def fits(self) -> bool:
        """Whether a QTensor holds it: whole blocks along K, the usual levels."""
        if len(self.shape) != 2 or self.shape[1] % self.block:
            return False
        if not np.array_equal(self.levels, np.asarray(LEVELS[self.fmt], np.float32)):
            return False
        if self.nested_levels is None:
            return True
        # their last bit depends on the machine that wrote them
        return self.nested == NESTED and np.allclose(self.nested_levels, dynamic_levels(), rtol=1e-6, atol=0)


class Bitsandbytes(Source):
    """A checkpoint with weights packed by bitsandbytes in 4 bits, over the Source of its files.

    Only the weights themselves have names here, with the shape and type that they have as numbers.
    """

    def __init__(self, files: Source):
        self.files, self.path = files, files.path
        names = dict.fromkeys(files.names())
        eight = next((name for name in names if name.endswith(".SCB")), None)
        if eight is not None or (self.config.get("quantization_config") or {}).get("load_in_8bit"):
            what = f"tensor {eight!r} belongs to" if eight else "config.json tells of"
            raise ValueError(
                f"{self.path}: {what} LLM.int8, which is not read; dequantize() the model in transformers and save it, "
                "or take a 4-bit or an unquantized checkpoint"
            )
        self._beside: dict[str, dict[str, str]] = {}  # {weight: {"absmax": its full name, ...}}
        for name in names:
            match = BESIDE.fullmatch(name)
            if match is None:
                continue
            if match[1] not in names:
                raise ValueError(f"{self.path}: holds {name!r} but no {match[1]!r}; fetch the checkpoint again")
            self._beside.setdefault(match[1], {})[match[2]] = name
        hidden = {name for beside in self._beside.values() for name in beside.values()}
        self._names = [name for name in names if name not in hidden]
        self._states: dict[str, State] = {}

    @property
    def config(self) -> Mapping[str, Any]:
        return self.files.config

    def tokenizer(self) -> Any | None:
        return self.files.tokenizer()

    def generation(self) -> Mapping[str, Any]:
        return self.files.generation()

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        state = self._state(name)
        return self.files.shape(name) if state is None else state.shape

    def dtype(self, name: str) -> np.dtype:
        state = self._state(name)
        return self.files.dtype(name) if state is None else state.dtype

    def read(self, name: str, *, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The numbers, as bitsandbytes dequantizes them; rows that `index` leaves out are not looked at."""
        state = self._state(name)
        if state is None:
            return self.files.read(name, index=index)
        index = index or tuple(slice(None) for _ in state.shape)
        first, last, _ = index[0].indices(state.shape[0])
        width = math.prod(state.shape[1:])
        start, stop = first * width, max(first, last) * width
        if start == stop:
            return np.zeros((0, *state.shape[1:]), state.dtype)[(slice(None), *index[1:])]
        code = self._codes(name, start, stop)
        blocks = slice(start // state.block, -(-stop // state.block))
        scale = np.repeat(self._scales(name, state, blocks), state.block)[start - blocks.start * state.block :][
            : stop - start
        ]
        numbers = (state.levels[code] * scale).astype(state.dtype)
        return np.ascontiguousarray(numbers.reshape(-1, *state.shape[1:])[(slice(None), *index[1:])])

    def packed(self, name: str) -> str | None:
        """The format of a weight that lies here in few bits and fits a QTensor; else None."""
        state = self._state(name)
        return state.fmt if state is not None and state.fits else None

    def read_packed(self, name: str) -> QTensor:
        """The weight [K, N] in the bits that it has here, in numpy arrays.

        Nested levels that differ from ours in the last bit, as some machines write them, are taken for ours.

        Raises:
          ValueError: `packed(name)` is None.
        """
        state = self._state(name)
        if state is None or not state.fits:
            why = "is not packed" if state is None else f"{state.shape} in blocks of {state.block} has no QTensor"
            raise ValueError(f"{self.path}: {name!r} {why}; read() gives its numbers")
        n, k = state.shape
        return QTensor(
            packed=np.ascontiguousarray(_swapped(self._bytes(name)).reshape(n, k // 2).T),
            scale=np.ascontiguousarray(self._part(name, "absmax").reshape(n, 1, k // state.block).T),
            nested=self._part(name, "nested_absmax") if state.nested else None,
            offset=np.asarray(state.offset) if state.nested else None,
            fmt=state.fmt,
            dtype=state.dtype,
        )

    def _bytes(self, name: str, part: slice | None = None) -> np.ndarray:
        """uint8 [...] of a packed weight, whatever type it is stored as."""
        if part is None:
            return np.ascontiguousarray(self.files.read(name)).view(np.uint8).reshape(-1)
        each = self.files.dtype(name).itemsize
        rows = slice(part.start // each, -(-part.stop // each))
        raw = np.ascontiguousarray(self.files.read(name, index=(rows, slice(0, 1)))).view(np.uint8).reshape(-1)
        return raw[part.start - rows.start * each :][: part.stop - part.start]

    def _part(self, name: str, part: str, index: slice = slice(None)) -> np.ndarray:
        return self.files.read(self._beside[name][part], index=(index,))

    def _scales(self, name: str, state: State, blocks: slice) -> np.ndarray:
        """f32 absmax of these blocks."""
        absmax = self._part(name, "absmax", blocks)
        if state.nested_levels is None:
            return absmax
        second = self._part(name, "nested_absmax")[np.arange(blocks.start, blocks.stop) // state.nested]
        return state.nested_levels[absmax] * second + state.offset

    def _codes(self, name: str, start: int, stop: int) -> np.ndarray:
        """0..15 of the numbers start..stop of a weight, counted row by row."""
        raw = self._bytes(name, slice(start // 2, -(-stop // 2)))
        return np.stack([raw >> 4, raw & 15], axis=-1).reshape(-1)[start % 2 :][: stop - start]

    def _state(self, name: str) -> State | None:
        """What lies beside a weight; None beside one that is not packed."""
        if name not in self._states and name in self._beside:
            self._states[name] = self._read_state(name)
        return self._states.get(name)

    def _read_state(self, name: str) -> State:
        beside = self._beside[name]
        at = f"{self.path}: tensor {name!r}"

        def fail(what: str) -> ValueError:
            return ValueError(f"{at}: {what}; fetch the checkpoint again")

        keys = [part for part in beside if part.startswith(STATE)]
        if len(keys) != 1:
            raise fail(f"{len(keys)} of {STATE}nf4 or fp4 beside it, not one")
        said = self._json(beside[keys[0]], at)
        fmt, block, dtype, shape = (said.get(key) for key in ("quant_type", "blocksize", "dtype", "shape"))
        if fmt not in FORMATS or keys[0] != STATE + str(fmt):
            raise ValueError(f"{at}: {keys[0]} says quant_type {fmt!r}; read are {', '.join(FORMATS)}")
        if type(block) is not int or block not in GROUPS[fmt]:
            raise fail(f"blocksize {block!r}; bitsandbytes has {', '.join(map(str, GROUPS[fmt]))}")
        if dtype not in TYPES:
            raise fail(f"dtype {dtype!r}; bitsandbytes has {', '.join(TYPES)}")
        if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
            raise fail(f"shape {shape!r} is none")

        def expect(part: str, kind: str, count: int) -> None:
            if part not in beside:
                raise fail(f"no .{part} beside it")
            got = self.files.shape(beside[part]), self.files.dtype(beside[part])
            if got != ((count,), np.dtype(kind)):
                why = f"shape {shape}, blocks of {block}"
                raise fail(f".{part} is {got[1]} {list(got[0])}, not {kind} [{count}] ({why})")

        size = math.prod(shape)
        blocks = -(-size // block)
        stored, lies = self.files.dtype(name), self.files.shape(name)
        if lies[1:] != (1,) or lies[0] * stored.itemsize != -(-size // 2):
            raise fail(f"{stored} {list(lies)} is not the {-(-size // 2)} bytes of shape {shape}")
        doubled = any("nested" in key for key in (*beside, *said))
        expect("absmax", "uint8" if doubled else "float32", blocks)
        expect("quant_map", "float32", 16)
        state = State(fmt, block, np.dtype(jnp.dtype(dtype)), tuple(shape), self._part(name, "quant_map"))
        if not doubled:
            return state
        each, kind, offset = (said.get(f"nested_{key}") for key in ("blocksize", "dtype", "offset"))
        if type(each) is not int or each <= 0 or kind != "float32":
            raise fail(f"nested_blocksize {each!r}, nested_dtype {kind!r}; wants a number and 'float32'")
        if not isinstance(offset, int | float) or not math.isfinite(offset):
            raise fail(f"nested_offset {offset!r} is no number")
        expect("nested_absmax", "float32", -(-blocks // each))
        expect("nested_quant_map", "float32", 256)
        levels = self._part(name, "nested_quant_map")
        return dataclasses.replace(state, nested=each, nested_levels=levels, offset=np.float32(offset))

    def _json(self, name: str, at: str) -> dict[str, Any]:
        raw = np.ascontiguousarray(self.files.read(name))
        try:
            said = json.loads(raw.tobytes().decode()) if raw.dtype == np.uint8 else None
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise ValueError(f"{at}: {name} is no JSON object in bytes; fetch the checkpoint again")
        return said


def to_tensors(name: str, w: QTensor, *, storage: Any = np.uint8) -> dict[str, np.ndarray]:
    """A weight as bitsandbytes saves it: the inverse of `Bitsandbytes.read_packed`, byte for byte.

    Args:
      name: "….weight".
      w: [K, N] in nf4 or fp4.
      storage: the type as which the bytes are declared, quant_storage in bitsandbytes.

    Returns:
      {name: [N K / 2 / itemsize, 1] of storage, name.absmax: ..., ...}.

    Raises:
      ValueError: another format or shape, or bytes that storage does not divide.
    """
    if w.fmt not in FORMATS or w.ndim != 2:
        raise ValueError(f"{name}: bitsandbytes holds {' and '.join(FORMATS)} [K, N], not {w.fmt} {w.shape}")
    k, n = w.shape
    raw, storage = _swapped(np.asarray(w.packed).T).reshape(-1), np.dtype(storage)
    if raw.size % storage.itemsize:
        raise ValueError(f"{name}: {raw.size} bytes are no whole number of {storage}; take storage uint8")
    said = {
        "quant_type": w.fmt,
        "blocksize": w.group,
        "dtype": jnp.dtype(w.dtype).name,
        "shape": [n, k],
    }
    tensors = {
        name: raw.view(storage).reshape(-1, 1),
        f"{name}.absmax": np.ascontiguousarray(np.asarray(w.scale)[:, 0].T).reshape(-1),
        f"{name}.quant_map": np.asarray(LEVELS[w.fmt], np.float32),
    }
    if w.double:
        said |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": float(w.offset)}
        tensors |= {f"{name}.nested_absmax": np.asarray(w.nested), f"{name}.nested_quant_map": dynamic_levels().copy()}
    tensors[f"{name}.{STATE}{w.fmt}"] = np.frombuffer(json.dumps(said).encode(), np.uint8).copy()
    return tensors


def _swapped(packed: np.ndarray) -> np.ndarray:
    """Bytes with their halves swapped: the first of two numbers lies in bitsandbytes' high half, a QTensor's low."""
    return np.ascontiguousarray(packed << 4 | packed >> 4)
