"""Held-out loss, scored answers, and honest comparison of two systems.

A result holds its figures and, under "per_row", each metric as one number per example whose mean is
the figure: what the paired bootstrap resamples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from peftax import processes, sharding
from peftax.data import function_calling
from peftax.train import loss

Batch = Mapping[str, np.ndarray]
ROWS = 8  # run together


@functools.partial(jax.jit, static_argnames=("apply", "chunk", "hits"))
def _at_tokens(apply: Callable, params: Any, batch: Any, *, chunk: int, hits: bool) -> dict[str, jax.Array]:
    """{figure: [B, T]}"""
    if hits:
        return loss.label_scores(apply, params, batch)
    return {"nll": loss.token_losses(apply, params, batch, chunk=chunk)}


def nll(
    apply: Callable,
    params: Any,
    batches: Batch | Iterable[Batch],
    *,
    batch_size: int = ROWS,
    chunk: int = 128,
    hits: bool = False,
    at: jax.sharding.NamedSharding | None = None,
) -> dict[str, Any]:
    """Token-weighted negative log likelihood of held-out rows.

    Args:
      apply: of a model with `hidden` and `head`, injected or not; keep it: a new one compiles anew.
      batches: all rows [N, T] at once, as packing lays them, or an iterable of batches.
      batch_size: rows run together, where all rows are given at once.
      chunk: positions of the sequence whose logits exist at one time.
      hits: also "accuracy", how often the target is the likeliest; all logits exist at one time: for classifiers.
      at: where a batch lies on a mesh: each device then has its own rows. Several processes all call with the same
        rows, and all have the result.

    Returns:
      nll, accuracy (with `hits`), tokens (that count; labels of a classifier),
      "per_row": {"nll": one number per example, in the rows' order};
      where the rows have groups also nll_values (targets of group 1), nll_boilerplate (group 0),
      and theirs per row.
    """
    if isinstance(batches, Mapping):
        parts = 1 if at is None else math.prod(at.mesh.shape[axis] for axis in jax.tree.leaves(at.spec[0]))
        batches = _cut(batches, batch_size, parts)
    sums: dict[str, list[np.ndarray]] = {}
    counts: list[np.ndarray] = []
    grouped = True
    for batch in batches:
        grouped = grouped and "groups" in batch
        given = {k: v for k, v in batch.items() if k != "groups"}
        if at is not None:
            given = processes.put(given, {k: sharding.of_batch(v.shape, at.mesh) for k, v in given.items()})
        found = _at_tokens(apply, params, given, chunk=chunk, hits=hits)
        found = {kind: processes.whole(x).astype(np.float64) for kind, x in found.items()}
        weights = np.asarray(batch["weights"], np.float64)
        segments = np.asarray(batch["segment_ids"])
        groups = np.asarray(batch["groups"]) if grouped else np.zeros_like(segments)
        for row in range(len(segments)):
            n = int(segments[row].max(initial=0))
            index = (segments[row], groups[row])
            for kind, x in found.items():
                sums.setdefault(kind, []).append(_sum_at(n, index, x[row] * weights[row]))
            counts.append(_sum_at(n, index, weights[row]))
    c = np.concatenate([np.zeros((0, 2)), *counts])
    if not c.sum():
        raise ValueError("evaluate: no token of these rows counts; is the split empty?")
    by_kind = {kind: np.concatenate(x) for kind, x in sums.items()}
    kinds = {kind: (x.sum(axis=1), c.sum(axis=1)) for kind, x in by_kind.items()}
    if grouped:
        s = by_kind["nll"]
        kinds |= {"nll_values": (s[:, 1], c[:, 1]), "nll_boilerplate": (s[:, 0], c[:, 0])}
    kinds = {k: v for k, v in kinds.items() if v[1].sum()}
    return {
        **{k: float(s.sum() / c.sum()) for k, (s, c) in kinds.items()},
        "tokens": float(c.sum()),
        "per_row": {k: s / c.mean() for k, (s, c) in kinds.items()},
    }


def together(parts: int, rows: int = ROWS) -> int:
    """Rows of one batch where the mesh cuts it into parts: every device has as many."""
    return -(-rows // parts) * parts


def valid(found: Mapping[str, Any]) -> dict[str, float]:
    """What a run writes of a look at valid: {"valid_nll", and "valid_accuracy" of a classifier}."""
    return {f"valid_{kind}": found[kind] for kind in ("nll", "accuracy") if kind in found}


def _cut(rows: Batch, batch_size: int, parts: int) -> Iterable[Batch]:
    n = len(rows["tokens"])
    b = together(parts, min(batch_size, n))
    for start in range(0, n, b or 1):
        part = {k: v[start : start + b] for k, v in rows.items()}
        short = b - len(part["tokens"])  # empty rows keep the shape
        yield {k: np.pad(v, ((0, short), (0, 0))) for k, v in part.items()}


def _sum_at(examples: int, index: tuple[np.ndarray, np.ndarray], x: np.ndarray) -> np.ndarray:
    """[examples, 2]: x summed by example and group; segment 0 is padding."""
    out = np.zeros((examples + 1, 2))
    np.add.at(out, index, x)
    return out[1:]


def function_calls(
    generate: Callable[[Any], Sequence[str]], prompts: Any, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Scores of the answers that `generate(prompts)` writes, one text for each row.

    Returns:
      {"all", "one tool", "2+ tools": rates of parse, name and match}, "texts", "scores" (of each
      row), "per_row" (as of all rows, and "match, 2+ tools" of those).
    """
    texts = list(generate(prompts))
    if len(texts) != len(rows):
        raise ValueError(f"evaluate: {len(texts)} answers for {len(rows)} rows")
    scores = [function_calling.score(t, r) for t, r in zip(texts, rows, strict=True)]
    per_row = {k: np.asarray([float(s[k]) for s in scores]) for k in ("parse", "name", "match")}
    many = np.asarray([len(r["tools"]) > 1 for r in rows], bool)
    if many.any():
        per_row |= {f"{k}, 2+ tools": per_row[k][many] for k in ("name", "match")}
    rates = function_calling.aggregate(scores, rows)
    return {**rates, "texts": texts, "scores": scores, "per_row": per_row}


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean of b - a, the ends of its 95% percentile interval) over examples resampled in pairs."""
    difference = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    if difference.ndim != 1 or not len(difference) or len(a) != len(b):
        raise ValueError(f"paired_bootstrap: {np.shape(a)} and {np.shape(b)} are not paired")
    rng, n = np.random.default_rng(seed), len(difference)
    means = [difference[rng.integers(n, size=n)].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def compare(
    before: Mapping[str, Any], after: Mapping[str, Any], *, draws: int = 10_000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """{metric: before, after, difference, low, high, rows} of two results on the same rows."""
    table = {}
    for metric, b in after["per_row"].items():
        if metric not in before["per_row"]:
            continue
        a = before["per_row"][metric]
        difference, low, high = paired_bootstrap(a, b, draws=draws, seed=seed)
        table[metric] = {
            "before": float(np.mean(a)),
            "after": float(np.mean(b)),
            "difference": difference,
            "low": low,
            "high": high,
            "rows": len(a),
        }
    return table


def markdown(table: Mapping[str, Mapping[str, float]], *, names: Sequence[str] = ()) -> str:
    """What `compare` returns as a table; rates are shown in %, losses as they are."""
    before, after = names or ("before", "after")
    lines = [f"| | {before} | {after} | difference [95%] | rows |", "|---|--:|--:|--:|--:|"]
    for metric, t in table.items():
        loss_like = metric.startswith("nll")
        scale, digits = (1, 3) if loss_like else (100, 1)
        a, b, d, low, high = (t[k] * scale for k in ("before", "after", "difference", "low", "high"))
        cells = f"{a:.{digits}f} | {b:.{digits}f} | {d:+.{digits}f} "
        cells += f"[{low:+.{digits}f}, {high:+.{digits}f}]"
        lines.append(f"| {metric}{'' if loss_like else ' %'} | {cells} | {t['rows']} |")
    return "\n".join(lines) + "\n"
