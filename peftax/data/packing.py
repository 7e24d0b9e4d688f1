"""Examples to rows of a fixed length: `pack` puts several into a row, `pad` one.

Neither lets an example see or count another: positions restart and segment ids differ, and the last
token of a segment has no target but its label, if it has one. Both hold the same (token, target, weight) triples.
"""

from collections.abc import Sequence

import numpy as np

from peftax.data.chat import Example

Rows = dict[str, np.ndarray]


def pack(examples: Sequence[Example], length: int, *, window: int = 64) -> Rows:
    """Rows [N, length]: tokens, targets, weights, positions, segment ids (1, 2, ...; 0 is padding).

    Best fit: each example, in the order given, goes into the fullest of the last `window` open rows
    that still holds it. The same examples give the same rows. Where examples have tasks, a row's are of one task, and
    the rows hold "tasks" [N, 1].
    """
    if window < 1:
        raise ValueError(f"window is {window}: at least one row must be open")
    bins: list[list[Example]] = []
    room: dict[int, int] = {}  # open rows, oldest first
    for example in examples:
        n = _size(example, length)
        fits = [(left, i) for i, left in room.items() if left >= n and bins[i][0].task == example.task]
        if fits:
            i = min(fits)[1]
        else:
            i = len(bins)
            bins.append([])
            room[i] = length
            if len(room) > window:
                del room[min(room, key=lambda j: (room[j], j))]  # close the fullest
        bins[i].append(example)
        if i in room:
            room[i] -= n
            if room[i] == 0:
                del room[i]
    return _lay(bins, length)


def pad(examples: Sequence[Example], length: int) -> Rows:
    """Rows [N, length] with one example each, in the order given, padded on the right."""
    for example in examples:
        _size(example, length)
    return _lay([[e] for e in examples], length)


def fill(rows: Rows) -> float:
    """The share of places that hold a token."""
    return float((rows["segment_ids"] > 0).mean())


def _size(example: Example, length: int) -> int:
    n = len(example.tokens)
    if n > length:
        raise ValueError(f"an example has {n} tokens, a row holds {length}: apply a length policy first")
    return n


def _lay(bins: Sequence[Sequence[Example]], length: int) -> Rows:
    if not bins:
        raise ValueError("no examples to lay into rows: the split is empty")
    shape = (len(bins), length)
    rows: Rows = {
        "tokens": np.zeros(shape, np.int32),
        "targets": np.zeros(shape, np.int32),
        "weights": np.zeros(shape, np.float32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
    }
    if all(e.groups is not None for row in bins for e in row):
        rows["groups"] = np.zeros(shape, np.int32)  # of the target, as weights are
    tasks = [row[0].task for row in bins]
    if any(task is not None for task in tasks):
        if None in tasks:
            raise ValueError("some examples have a task_id and some have none; give all one")
        rows["tasks"] = np.asarray(tasks, np.int32)[:, None]
    for r, examples in enumerate(bins):
        at = 0
        for segment, e in enumerate(examples, start=1):
            n = len(e.tokens)
            here, before_last = slice(at, at + n), slice(at, at + n - 1)
            rows["tokens"][r, here] = e.tokens
            if e.label is None:
                rows["targets"][r, before_last] = e.tokens[1:]
                rows["weights"][r, before_last] = e.weights[1:]
            else:
                rows["targets"][r, at + n - 1], rows["weights"][r, at + n - 1] = e.label, 1.0
            rows["positions"][r, here] = np.arange(n)
            rows["segment_ids"][r, here] = segment
            if "groups" in rows:
                rows["groups"][r, before_last] = e.groups[1:]  # type: ignore[index]
            at += n
    return rows
