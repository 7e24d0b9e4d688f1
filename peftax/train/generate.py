"""Batched generation: left padding, a KV cache, and one compiled program for a batch of one shape.

A call sorts the prompts by length into batches whose padded length is a multiple of `bucket`, so a
test set meets few shapes. Parameters are an argument: others of the same structure (an adapter of a
later step, folded weights) run the same program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax.core.method import Ctx

Prompts = Sequence[Sequence[int]]


class Generator:
    """Continues prompts; greedy at temperature 0.

    Args:
      apply: of a model with `hidden` (which takes a cache) and `head`; injected or not.
      init_cache: (batch, length) -> an empty cache, as the model's own.
      front: virtual tokens that the injected method puts before the first (`Method.front`).
      max_new_tokens: the most tokens a prompt is continued by.
      eos_ids: a row ends at any of these, a batch when all its rows have ended.
      task: the task of all rows, where the injected method serves several; None: its own.
      pad_id: any id that the model knows; no real token sees it.
      batch_size: rows run together; fewer prompts run in a batch of their number.
      bucket: prompts are padded to multiples of this; smaller wastes less and compiles more.
      temperature, top_k, top_p: how to sample above temperature 0: among the top_k likeliest tokens
        (0: all) and among the fewest that hold top_p of the probability, the likeliest always.
      seed: of the samples. A row's draws depend on its place among the prompts, not on its batch.
    """

    def __init__(
        self,
        apply: Callable,
        init_cache: Callable[[int, int], Any],
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        front: int = 0,
        task: int | None = None,
        pad_id: int = 0,
        batch_size: int = 16,
        bucket: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ):
        sizes = dict(max_new_tokens=max_new_tokens, batch_size=batch_size, bucket=bucket)
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"generate: {name} is {value}; it must be at least 1")
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"generate: temperature {temperature} and top_k {top_k} must not be negative, "
                f"top_p {top_p} must lie in (0, 1]"
            )
        self._apply, self._init_cache, self.front, self.task = apply, init_cache, front, task
        self.max_new_tokens, self.eos_ids, self.pad_id = max_new_tokens, tuple(eos_ids), pad_id
        self.batch_size, self.bucket = batch_size, bucket
        self.temperature, self.top_k, self.top_p, self.seed = temperature, top_k, top_p, seed
        self._prefill = jax.jit(self._prefix_cache)
        self._run = jax.jit(self._continue, static_argnames="before")

    def __call__(
        self,
        params: Any,
        prompts: Prompts,
        *,
        prefix: Sequence[int] | None = None,
        adapters: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The new tokens of every prompt, in the prompts' order, without the eos that ended them.

        Args:
          params: what `apply` takes.
          prompts: token ids.
          prefix: ids that stand before every prompt; the model reads them once, not once a row.
          adapters: of a mixed batch (peftax/mixed_batch.py), which one each prompt takes; -1 for none.
        """
        if adapters is not None and (prefix or len(adapters) != len(prompts)):
            raise ValueError(
                f"generate: {len(adapters)} adapters for {len(prompts)} prompts; give one for each, and no prefix, "
                "which only one of them could have read"
            )
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {i} is empty: it needs a token to continue")
        before = len(prefix or ())
        first = np.asarray(prefix or (), np.int32)[None]
        cache = self._prefill(params, first) if before + self.front else None
        key = jax.random.key(self.seed)
        out: list[list[int]] = [[] for _ in prompts]
        for rows, tokens, lengths in self._batches(prompts):
            ids = np.concatenate([rows, np.zeros(len(lengths) - len(rows), np.int32)])
            which = None if adapters is None else np.asarray(adapters, np.int32)[ids]
            new = self._run(params, cache, tokens, lengths, ids, key, which, before=before)
            for row, made in zip(rows, np.asarray(new)[: len(rows)], strict=True):
                ends = np.flatnonzero(np.isin(made, self.eos_ids))
                out[row] = made[: ends[0] if len(ends) else None].tolist()
        return out

    def compiled(self) -> int:
        """How many programs have been compiled so far."""
        return self._prefill._cache_size() + self._run._cache_size()

    def _batches(self, prompts: Prompts) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(places among the prompts, tokens [B, T], lengths [B]), the longest prompts first."""
        sizes = np.asarray([len(p) for p in prompts], np.int32)
        order = np.argsort(-sizes, kind="stable").astype(np.int32)
        b = min(self.batch_size, len(prompts))
        for start in range(0, len(prompts), b or 1):
            rows = order[start : start + b]
            t = -(-int(sizes[rows[0]]) // self.bucket) * self.bucket
            tokens = np.full((b, t), self.pad_id, np.int32)
            lengths = np.zeros(b, np.int32)
            for i, row in enumerate(rows):
                lengths[i] = sizes[row]
                tokens[i, t - lengths[i] :] = prompts[row]
            yield rows, tokens, lengths

    # ---- compiled --------------------------------------------------------------------------------

    def _hidden(self, params, tokens, positions, segments, cache, **more):
        variables = {"params": params}
        return self._apply(variables, tokens, positions, segments, cache=cache, method="hidden", **more)

    def _prefix_cache(self, params, tokens_1xP):
        p = tokens_1xP.shape[1]
        positions, segments = jnp.arange(p)[None], jnp.ones((1, p), jnp.int32)
        tasks = None if self.task is None else jnp.array([self.task])
        more = {"ctx": Ctx(start=True, tasks=tasks)} if self.front else {}  # a plain model.apply takes none
        cache = self._init_cache(1, self.front + p)
        return self._hidden(params, tokens_1xP, positions, segments, cache, **more)[1]

    def _continue(self, params, prefix, tokens_BxT, lengths_B, rows_B, key, adapters_B, *, before):
        more = {} if adapters_B is None else {"ctx": Ctx(adapters=adapters_B)}
        b, t = tokens_BxT.shape
        n = self.max_new_tokens
        eos = jnp.asarray(self.eos_ids, jnp.int32)
        held = self.front + before
        cache = self._init_cache(b, held + t + n - 1)
        if held:
            wide = jax.eval_shape(lambda: self._init_cache(b, held))
            cache = jax.tree.map(
                lambda new, old, like: jax.lax.dynamic_update_slice(
                    new, jnp.broadcast_to(old, like.shape), (0,) * new.ndim
                ),
                cache,
                prefix,
                wide,
            )
        keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)

        def pick(h_BxD, i):
            logits_BxV = self._apply({"params": params}, h_BxD[:, None], method="head", **more)[:, 0]
            return self._pick(logits_BxV, jax.vmap(lambda k: jax.random.fold_in(k, i))(keys_B))

        place_BxT = jnp.arange(t)[None] - (t - lengths_B)[:, None]
        segments_BxT = (place_BxT >= 0).astype(jnp.int32)
        positions_BxT = jnp.where(place_BxT >= 0, before + place_BxT, 0)
        h, cache = self._hidden(params, tokens_BxT, positions_BxT, segments_BxT, cache, **more)
        token_B = pick(h[:, -1], 0)
        out_BxN = jnp.zeros((b, n), jnp.int32).at[:, 0].set(token_B)
        done_B = (lengths_B == 0) | jnp.isin(token_B, eos)

        def going(state):
            i, _, done_B, _, _ = state
            return (i < n) & ~jnp.all(done_B)

        def step(state):
            i, token_B, done_B, out_BxN, cache = state
            at_Bx1 = (before + lengths_B + i - 1)[:, None]
            h, cache = self._hidden(params, token_B[:, None], at_Bx1, jnp.ones_like(at_Bx1), cache, **more)
            token_B = pick(h[:, 0], i)
            out_BxN = jax.lax.dynamic_update_slice(out_BxN, token_B[:, None], (0, i))
            return i + 1, token_B, done_B | jnp.isin(token_B, eos), out_BxN, cache

        state = (jnp.int32(1), token_B, done_B, out_BxN, cache)
        return jax.lax.while_loop(going, step, state)[3]

    def _pick(self, logits_BxV, keys_B):
        logits_BxV = logits_BxV.astype(jnp.float32)
        if self.temperature == 0:
            return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
        logits_BxV /= self.temperature
        if 0 < self.top_k < logits_BxV.shape[1]:
            least_Bx1 = jax.lax.top_k(logits_BxV, self.top_k)[0][:, -1:]
            logits_BxV = jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)
        if self.top_p < 1:
            sorted_BxV = -jnp.sort(-logits_BxV, axis=-1)
            p_BxV = jax.nn.softmax(sorted_BxV, axis=-1)
            kept_BxV = jnp.cumsum(p_BxV, axis=-1) - p_BxV < self.top_p  # mass of the likelier ones
            least_Bx1 = jnp.min(jnp.where(kept_BxV, sorted_BxV, jnp.inf), axis=-1, keepdims=True)
            logits_BxV = jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)
        return jax.vmap(jax.random.categorical)(keys_B, logits_BxV).astype(jnp.int32)


def split_prefix(prompts: Prompts) -> tuple[list[int], list[list[int]]]:
    """(the ids that all prompts begin with, what is left of each: a token at least)."""
    if not prompts:
        return [], []
    first, last = min(prompts, key=list), max(prompts, key=list)  # no two differ earlier than these
    n = 0
    while n < min(len(p) for p in prompts) - 1 and first[n] == last[n]:
        n += 1
    return list(first[:n]), [list(p[n:]) for p in prompts]
