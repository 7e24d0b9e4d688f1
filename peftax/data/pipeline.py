"""Rows to batches: shuffled anew each epoch by a seed, resumable at the exact batch.

Examples are shuffled once (`shuffle`) and packed once; what is reshuffled each epoch is the packed
rows. So who shares a row with whom stays fixed, which does not matter: examples of a row do not see
each other.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from peftax.data.packing import Rows

T = TypeVar("T")


def shuffle(items: Sequence[T], seed: int) -> list[T]:
    """The items in an order set by the seed alone."""
    order = np.random.default_rng(seed).permutation(len(items))
    return [items[int(i)] for i in order]


def batches(
    rows: Rows,
    *,
    batch_size: int,
    seed: int,
    epochs: int | None = None,
    accumulate: int = 1,
    drop_remainder: bool = True,
    shuffled: bool = True,
) -> "Batches":
    """An iterator over batches: [batch_size, T], or [accumulate, batch_size, T] above 1.

    `epochs=None` never ends. No batch crosses an epoch; the short last one is dropped, or filled up
    with empty rows (weight and segment 0) so that the step compiles once.
    """
    return Batches(rows, batch_size, seed, epochs, accumulate, drop_remainder, shuffled)


class Batches(Iterator[Rows]):
    """See `batches`. `get_state()` is a small JSON-able dict; `set_state()` checks the data."""

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        seed: int,
        epochs: int | None,
        accumulate: int,
        drop_remainder: bool,
        shuffled: bool,
    ):
        import grain  # takes seconds; the command line must not wait for it

        n = len(rows["tokens"])
        whole = batch_size * accumulate
        if min(batch_size, accumulate) < 1:
            raise ValueError(f"batch_size {batch_size} and accumulate {accumulate} must be at least 1")
        if drop_remainder and n < whole:
            raise ValueError(
                f"{n} rows do not fill one batch of {accumulate} x {batch_size}: make it smaller, or keep the remainder"
            )
        self._rows, self._shape = rows, (accumulate, batch_size)
        order = grain.MapDataset.range(n)
        if shuffled:
            order = order.shuffle(seed=seed)
        order = order.batch(whole, drop_remainder=drop_remainder)
        self.per_epoch = len(order)
        self._order = order.repeat(epochs)
        self._next = 0
        self._identity = {
            "rows": n,
            "batch": whole,
            "seed": seed if shuffled else None,
            "drop_remainder": drop_remainder,
            "data": _checksum(rows["tokens"]),
            "learned": _checksum(*(rows[name] for name in sorted(rows) if name != "tokens")),
        }

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Rows:
        chosen = self._chosen()
        return {name: _taken(array, chosen) for name, array in self._rows.items()}

    def place(self, lies: Callable[[tuple[int, ...]], jax.sharding.Sharding]) -> dict[str, jax.Array]:
        """The next batch, each array as `lies(its shape)` says; this process copies only what its own devices hold."""
        chosen = self._chosen()
        axes = chosen.ndim  # in front of a row's own

        def one(array: np.ndarray) -> jax.Array:
            shape = (*chosen.shape, *array.shape[1:])
            return jax.make_array_from_callback(
                shape, lies(shape), lambda index: _taken(array, chosen[index[:axes]])[(..., *index[axes:])]
            )

        return {name: one(array) for name, array in self._rows.items()}

    def _chosen(self) -> np.ndarray:
        """Which rows the next batch holds, [B] or [k, B]; -1 is an empty one."""
        if self._next >= len(self._order):
            raise StopIteration
        index = np.asarray(self._order[self._next])
        self._next += 1
        k, b = self._shape
        index = np.concatenate([index, np.full(k * b - len(index), -1, index.dtype)])
        return index.reshape(k, b) if k > 1 else index

    @property
    def epoch(self) -> float:
        """How many epochs lie behind the next batch."""
        return self._next / self.per_epoch

    def get_state(self) -> dict[str, Any]:
        return {"next": self._next, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        for key, mine in self._identity.items():
            if state.get(key, mine) != mine:  # what was saved before there was "learned" lacks it
                raise ValueError(
                    f"the saved data position has {key} {state.get(key)!r}, this run {mine!r}: "
                    "resume with the same data, seed and batch size"
                )
        self._next = int(state["next"])


def _checksum(*arrays: np.ndarray) -> int:
    found = 0
    for array in arrays:
        found = zlib.crc32(np.ascontiguousarray(array), found)
    return found


def _taken(array: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """[*chosen, ...]: rows by number, zeros for -1."""
    rows = array[chosen]
    rows[chosen < 0] = 0
    return rows
