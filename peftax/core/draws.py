"""What torch's CPU generator draws, in numpy: numbers that Hugging Face PEFT makes from a seed and does not save."""

from __future__ import annotations

import array
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

LARGE = (2**32 - 1) // 20  # from this length on torch permutes by another rule
CHUNK = 2**22


class Generator:
    """torch.Generator().manual_seed(seed): one stream of 32-bit draws, which every call continues.

    Permutations and short floats are torch's to the bit, float32 up to the last rounding.
    """

    def __init__(self, seed: int):
        self._source = np.random.RandomState(seed % 2**32)
        self._unread = 0  # draws to pass over before the next one
        self._second: float | None = None  # the other half of the last pair that was drawn one by one

    def uniform(
        self, shape: Sequence[int], low: float = 0.0, high: float = 1.0, *, dtype: Any = np.float32
    ) -> np.ndarray:
        """What `uniform_(low, high)` fills a tensor of this type (float32, float16, bfloat16) with."""
        unit = (self._raw(math.prod(shape)) & 0xFFFFFF).astype(np.float32).reshape(shape) * np.float32(2.0**-24)
        start, width = np.float32(low), np.float32(high - low)
        if dtype == np.float32:
            return unit * width + start  # torch rounds once, so that the last bit may differ
        value = (unit.astype(np.float64) * width + start).astype(np.float32).astype(dtype)
        return np.where(value == np.asarray(high, dtype), np.asarray(low, dtype), value)

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        """What `normal_()` fills a float32 tensor with."""
        n = math.prod(shape)
        if n < 16:
            return np.array([self._one_normal() for _ in range(n)], np.float32).reshape(shape)
        unit = self.uniform((n,))
        values = np.empty(n, np.float32)
        whole = n - n % 16
        values[:whole] = _pairs(unit[:whole])
        if n % 16:  # the last 16 are drawn anew, over some that were there
            values[-16:] = _pairs(self.uniform((16,)))
        return values.reshape(shape)

    def permutation(self, n: int, first: int | None = None) -> np.ndarray:
        """The first entries (None: all) of `randperm(n)`, int64.

        While n < LARGE the time is that of `first`, else of n draws: seconds.
        """
        k = n if first is None else min(first, n)
        if n >= LARGE:
            return self._large_permutation(n, k)
        steps = max(min(k, n - 1), 0)
        jumps = (self._raw(steps) % np.arange(n, n - steps, -1)).tolist()
        self._unread += max(n - 1, 0) - steps
        # entry i changes places with entry i + jump; what has not moved is its own number
        moved = {} if 8 * k < n else array.array("q", range(n))
        if isinstance(moved, dict):
            taken = []
            for i, jump in enumerate(jumps):
                j = i + jump
                here = moved.pop(i, i)
                if jump:
                    taken.append(moved.get(j, j))
                    moved[j] = here
                else:
                    taken.append(here)
            return np.array(taken, np.int64)
        for i, jump in enumerate(jumps):
            if jump:
                moved[i], moved[i + jump] = moved[i + jump], moved[i]
        return np.array(moved[:k], np.int64)

    def _large_permutation(self, n: int, k: int) -> np.ndarray:
        """Entry i goes to a place z <= i, whose entry goes to i: those that end before k came last."""
        if 8 * k > n:
            raise ValueError(f"draws: all of a permutation of {n} entries is too much; ask for the first few")
        values = np.arange(k)
        for start in range(0, n, CHUNK):
            stop = min(n, start + CHUNK)
            high, low = self._raw(2 * (stop - start)).reshape(-1, 2).T.astype(np.uint64)
            i = np.arange(start, stop)
            z = ((high << np.uint64(32) | low) % (i + 1).astype(np.uint64)).astype(np.int64)
            for to, entry in zip(z[z < k].tolist(), i[z < k].tolist(), strict=True):
                if entry < k:
                    values[entry] = values[to]
                values[to] = entry
        return values

    def _raw(self, n: int) -> np.ndarray:
        """The next n draws, uint32."""
        while self._unread:
            passed = min(self._unread, CHUNK)
            self._source.randint(0, 2**32, size=passed, dtype=np.uint32)
            self._unread -= passed
        return self._source.randint(0, 2**32, size=n, dtype=np.uint32)

    def _one_normal(self) -> float:
        """Fewer than 16 are drawn pair by pair, of 53 bits each."""
        if self._second is not None:
            value, self._second = self._second, None
            return value
        high, low = self._raw(4).reshape(2, 2).T.astype(np.uint64)
        angle, unit = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53
        radius = math.sqrt(-2.0 * math.log1p(-unit))
        self._second = radius * math.sin(2 * math.pi * angle)
        return radius * math.cos(2 * math.pi * angle)


def kaiming_bound(fan_in: int, a: float = 0.0) -> float:
    """The b of U(±b) in `kaiming_uniform_(a=a)`; fan_in is a torch tensor's second size times all that follow."""
    return math.sqrt(2.0 / (1.0 + a * a)) * math.sqrt(3.0) / math.sqrt(fan_in)


def _pairs(unit: np.ndarray) -> np.ndarray:
    """Normal numbers from uniform ones: in each 16 the first eight give the radius and the others the angle."""
    blocks = unit.reshape(-1, 2, 8)
    radius = np.sqrt(-2.0 * np.log((np.float32(1.0) - blocks[:, 0]).astype(np.float64)))
    angle = 2.0 * math.pi * blocks[:, 1].astype(np.float64)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32).reshape(-1)
