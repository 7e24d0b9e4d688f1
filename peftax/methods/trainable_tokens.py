"""Trainable tokens: rows of the embedding train, those of the tokens that are named (Hugging Face PEFT, 2025).

  y = E'[x]        E'[t] = rows[j] for the tokens t = ids[j], else E[t]
  z = x E'ᵀ        at a head that is tied to the table

  rows    : [rows, out]  trainable f32, the table's own
  columns : [in, rows]   trainable f32, the kernel's own    where a target is a head with a kernel of its own
  ids     : [rows]       frozen i32, the tokens

Identity at init. Trainable: tokens times hidden.
Learning rate: 1e-3 to 2e-1 (PEFT's MetaMathQA run, of two tokens: 2e-1; beside LoRA they train at its rate).
Source: https://huggingface.co/docs/peft/package_reference/trainable_tokens; made for tokens that are new to the
tokenizer, which config.model.new_tokens adds. LoRA, DoRA and AdaLoRA train such rows beside their own:
`tokens`.
Departs: Hugging Face PEFT copies the table with the rows in it, at every call; here only the rows looked up are
chosen between, so that the step makes nothing of the table's size. A head's bias stays, which PEFT leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftax.core import hf, rows
from peftax.core.method import Method
from peftax.core.targets import Targets

AXES = rows.AXES


def trainable_tokens(
    *,
    tokens: Sequence[int | str] = (),  # ids, or in a run's config the tokens themselves
    targets: str | Sequence[str] = ("embed_tokens",),  # regex over whole names | names and suffixes: tables, heads
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Rows of the embedding, token by token."""
    config = dict(locals())
    target = Targets(modules=targets, kinds=("embed", "linear"))
    return rows.per_token(
        "trainable_tokens",
        lambda name, kind: {"tokens": tuple(tokens)},
        targets=target,
        adapter=adapter,
        config=config,
    )


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tokens": tuple(config.get("token_indices") or ()),
        "targets": config.get("target_modules") or ("embed_tokens",),
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"token_indices": list(config["tokens"]), "target_modules": config["targets"], "init_weights": True}


HF = hf.Format(
    peft_type="TRAINABLE_TOKENS",
    keys={
        "embed": {"rows": "trainable_tokens_delta"},
        "linear": {"columns": "trainable_tokens_delta"},
        "head": {"rows": "trainable_tokens_delta"},  # a tied one's copy
    },
    straight=("rows",),
    read=_read,
    write=_write,
)
