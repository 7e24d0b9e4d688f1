"""Multitask prompt tuning: one prompt for all tasks times a low-rank matrix of each (Wang et al., 2023).

  h = [P_t ; E[x]]      P_t = P ⊙ (C_t R_t): `length` rows of the row's task t; the outputs there are cut off

  p    : [length, out]         trainable f32, N(0, 1)
  cols : [tasks, length, rank] trainable f32, N(0, 0.02²)
  rows : [tasks, rank, out]    trainable f32, N(0, 0.02²)

Not the identity at init. Trainable: length x hidden, and tasks x rank (length + hidden).
Learning rate: 1e-3 to 3e-1 (those of prompt tuning: Lester et al. 0.3, PEFT's MetaMathQA runs of it 1e-3).
Source: https://arxiv.org/abs/2303.02861, its prompt decomposition, of rank 1 there.
Departs: no distillation from prompts of single tasks, which the paper's source training adds; config.warm_start takes
the values of an adapter with as many tasks. Starts as in Hugging Face PEFT. The task is the row's: `Ctx.tasks`, or a
batch's `tasks` [B, 1], which come from a column task_id; packing puts examples of one task into a row. A task that does
not exist gives NaN.
Not a change of weights, so that nothing folds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from peftax.core import front, hf
from peftax.core.method import Ctx, Kernel, Method

AXES = {"p": ("length", "out"), "cols": ("tasks", "length", "rank"), "rows": ("tasks", "rank", "out")}


def multitask_prompt(
    *,
    length: int = 20,  # virtual tokens
    tasks: int = 1,  # how many there are
    rank: int = 1,  # of a task's matrix
    task: int = 0,  # of rows whose batch names none
    table: str | None = None,  # suffix of the tokens' table, where the model has several
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """A prompt for every task."""
    config = dict(locals())
    for key, value in (("length", length), ("tasks", tasks), ("rank", rank)):
        if value < 1:
            raise ValueError(f"multitask_prompt: {key} {value} must be at least 1")
    if not 0 <= task < tasks:
        raise ValueError(f"multitask_prompt: task {task} is none of 0 to {tasks - 1}")

    def init(key, k: Kernel):
        width, keys = k.w.shape[1], jax.random.split(key, 3)
        leaves = {
            "p": jax.random.normal(keys[0], (length, width)),
            "cols": 0.02 * jax.random.normal(keys[1], (tasks, length, rank)),
            "rows": 0.02 * jax.random.normal(keys[2], (tasks, rank, width)),
        }
        return {"trainable": leaves}

    def rows(theta, ctx: Ctx, n: int):
        which = jnp.array([task]) if ctx.tasks is None else ctx.tasks
        if which.shape not in ((n,), (1,)):
            raise ValueError(f"multitask_prompt: tasks {which.shape} of {n} rows; want one a row, ({n},)")
        cols, rows = (jnp.take(theta[leaf], which, axis=0, mode="fill") for leaf in ("cols", "rows"))
        return theta["p"][None] * (cols @ rows)

    return front.prompts(
        "multitask_prompt",
        length=length,
        init=init,
        rows=rows,
        axes=AXES,
        table=table,
        adapter=adapter,
        config=config,
    )


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    if (config.get("num_transformer_submodules") or 1) != 1:
        raise hf.Unsupported(
            "MULTITASK_PROMPT_TUNING of an encoder and decoder is not supported; the nearest is a decoder's"
        )
    return {
        "length": config["num_virtual_tokens"],
        "tasks": config.get("num_tasks") or 1,
        "rank": config.get("num_ranks") or 1,
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_virtual_tokens": config["length"],
        "num_tasks": config["tasks"],
        "num_ranks": config["rank"],
        "prompt_tuning_init": "RANDOM",
        "num_transformer_submodules": 1,
    }


_KEYS = {"p": "prompt_embeddings", "cols": "prefix_task_cols", "rows": "prefix_task_rows"}


def _pack(layers: hf.Layers, config: Mapping[str, Any]) -> dict[str, Any]:
    ((_, leaves),) = layers.items()
    return {key: leaves[leaf] for leaf, key in _KEYS.items()}


def _unpack(tensors: Mapping[str, Any], shapes: Mapping[str, Any], config: Mapping[str, Any]) -> hf.Layers:
    (name,) = shapes
    return {name: {leaf: tensors[key] for leaf, key in _KEYS.items()}}


HF = hf.Format(peft_type="MULTITASK_PROMPT_TUNING", root=hf.BARE, read=_read, write=_write, pack=_pack, unpack=_unpack)
