"""One example (chat messages, or a prompt and its completion) to token ids and a loss mask.

A chat is tokenized turn by turn: the generation prompt before each assistant turn, then what the
template adds for that turn. So the ids the model is trained on after a prompt follow exactly the
ids it will be prompted with, which is checked, not assumed. No bos or eos is added beyond what the
template (or the completion's own text) holds.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """`tokens` [n] int32, `weights` [n] float32 on tokens: 1 where the token is to be learned.

    `row` is its place among the rows it was encoded from.
    `groups` [n] int32, where given, sorts those tokens for reports: 1 inside the spans that
    `encode` was given, 0 outside.
    `task`, where given, is its row's "task_id".
    `label`, where given, is what all tokens together are to be told: the target at the last one, in place of the next.
    """

    tokens: np.ndarray
    weights: np.ndarray
    groups: np.ndarray | None = None
    row: int = -1
    task: int | None = None
    label: int | None = None


@dataclasses.dataclass
class _Piece:
    """Consecutive ids with their character spans in the rendered text; one per prompt or answer."""

    ids: list[int]
    offsets: list[Span]


def prompt_ids(messages: Sequence[Mapping[str, Any]] | str, tokenizer: Any, **template: Any) -> list[int]:
    """The ids to generate from: the generation prompt of a chat, or a plain text's own ids."""
    text = messages if isinstance(messages, str) else _render(messages, tokenizer, True, template)
    return _tokenize(text, tokenizer).ids


def encode(row: Mapping[str, Any], tokenizer: Any) -> Example:
    """One row, `{"messages": [...]}` or `{"prompt": ..., "completion": ...}`, to an `Example`.

    A chat may hold `"tools"` too, if its template takes them. Every assistant turn counts, its
    end-of-turn token included, nothing else. `"spans"`, where given, are character spans of the
    last assistant turn's content (of the completion): tokens that overlap one get group 1.
    `"task_id"`, where given, numbers the row's task, for methods that serve several.
    """
    spans = row.get("spans")
    chat = row.get("messages") is not None
    if chat:
        pieces, last = _chat(row, tokenizer)
        content = row["messages"][last]["content"]
    elif row.get("prompt") is not None and row.get("completion") is not None:
        for key in ("prompt", "completion"):
            if not isinstance(row[key], str):
                raise ValueError(
                    f"{key!r} is {row[key]!r:.80}, no text: chats belong into 'messages'; of numbers a template of "
                    "config.data.prompt and config.data.completion makes text"
                )
        content = row["completion"]
        prompt = _tokenize(row["prompt"], tokenizer)
        answer = _continue(prompt, row["prompt"], row["prompt"] + content, tokenizer)
        pieces = [(prompt, False, row["prompt"]), (answer, True, row["prompt"] + content)]
    else:
        there = sorted(k for k in row if row[k] is not None)
        raise ValueError(
            f"a row needs 'messages', or 'prompt' and 'completion'; this one has {there}: make these of its "
            "columns with config.data.prompt and config.data.completion"
        )
    ids: list[int] = []
    weights: list[float] = []
    groups: list[int] = []
    for at, (piece, learned, text) in enumerate(pieces):
        n = _end_of_turn(piece.ids, tokenizer) if learned and chat else len(piece.ids)
        ids += piece.ids
        weights += [float(learned)] * n + [0.0] * (len(piece.ids) - n)
        hits = [0] * len(piece.ids)
        if spans and at == len(pieces) - 1:
            hits = _overlaps(piece, text, len(pieces[at - 1][2]), content, spans)
        groups += hits
    weights[:1] = [0.0]  # nothing predicts the first token
    if not any(weights):
        raise ValueError("the example has no token to learn: its answers are empty")
    return Example(
        np.asarray(ids, np.int32),
        np.asarray(weights, np.float32),
        None if spans is None else np.asarray(groups, np.int32),
        task=_task(row),
    )


def _task(row: Mapping[str, Any]) -> int | None:
    task = row.get("task_id")
    if task is not None and (isinstance(task, bool) or not isinstance(task, int | np.integer) or task < 0):
        raise ValueError(f"task_id {task!r} is no number of a task: want 0, 1, ...")
    return None if task is None else int(task)


def encode_all(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    length: int,
    policy: str = "drop",
    split: str = "train",
    encode: Callable[[Mapping[str, Any], Any], Example] = encode,
) -> tuple[list[Example], dict[str, Any]]:
    """Encode every row under a length policy.

    `drop` long rows, `truncate` them on the right, or raise an `error`. Returns the examples and
    their counts: split, rows, kept, dropped, truncated, tokens, learned. A row whose answer a cut
    would remove altogether is dropped. `encode` makes an example of a row and the tokenizer.
    """
    if policy not in ("drop", "truncate", "error"):
        raise ValueError(f"length policy {policy!r} is none of: drop, truncate, error")
    examples: list[Example] = []
    counts: dict[str, Any] = dict(split=split, rows=0, kept=0, dropped=0, truncated=0)
    for number, row in enumerate(rows):
        counts["rows"] += 1
        try:
            example = dataclasses.replace(encode(row, tokenizer), row=number)
        except ValueError as err:
            raise ValueError(f"{split} row {number}: {err}") from err
        n = len(example.tokens)
        if n > length and policy == "error":
            raise ValueError(
                f"{split} row {number} has {n} tokens, above the context of {length}: raise it, "
                "or choose the length policy drop or truncate"
            )
        if n > length:
            example = truncate(example, length) if policy == "truncate" else None
            counts["dropped" if example is None else "truncated"] += 1
        if example is not None:
            examples.append(example)
    counts["kept"] = len(examples)
    counts["tokens"] = int(sum(len(e.tokens) for e in examples))
    counts["learned"] = int(sum(e.weights.sum() for e in examples))
    logging.info(
        "%(split)s: %(rows)d rows, %(kept)d kept, %(dropped)d dropped and %(truncated)d truncated "
        "for length, %(tokens)d tokens, %(learned)d of them learned",
        counts,
    )
    if counts["rows"] and not examples:
        raise ValueError(f"{split}: all {counts['rows']} rows are above {length} tokens: raise the context")
    return examples, counts


def truncate(example: Example, length: int) -> Example | None:
    """The first `length` tokens; None where none of them is to be learned. Of a labelled example the last one stays,
    where its label and the tokenizer's mark of an end stand.
    """
    if example.label is not None:
        kept = [*range(length - 1), len(example.tokens) - 1]
        return dataclasses.replace(example, tokens=example.tokens[kept], weights=example.weights[kept])
    if not example.weights[:length].any():
        return None
    cut = {
        k: None if x is None else x[:length] for k, x in vars(example).items() if k in ("tokens", "weights", "groups")
    }
    return dataclasses.replace(example, **cut)


def _chat(row: Mapping[str, Any], tokenizer: Any) -> tuple[list[tuple[_Piece, bool, str]], int]:
    messages = row["messages"]
    if isinstance(messages, str | Mapping) or not all(isinstance(m, Mapping) and m.get("role") for m in messages):
        raise ValueError(f"'messages' must be a list of {{'role': ..., 'content': ...}}, not {messages!r:.80}")
    template = {"tools": row["tools"]} if row.get("tools") else {}
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        roles = [m["role"] for m in messages]
        raise ValueError(f"no assistant turn to learn from, only {roles}: add the answer")
    if any(not isinstance(messages[i].get("content"), str) for i in turns):
        raise ValueError("an assistant turn has no text content: only text answers are supported")
    pieces: list[tuple[_Piece, bool, str]] = []
    ids: list[int] = []
    done = ""
    for i in turns:
        prompt = _render(messages[:i], tokenizer, True, template)
        full = _render(messages[: i + 1], tokenizer, False, template)
        if not prompt.startswith(done) or not full.startswith(prompt):
            raise ValueError(
                f"the chat template is not prefix-stable: the text before turn {i} changes once "
                "it is answered, so training and generation prompts would differ; "
                "use another chat template"
            )
        tokens = _tokenize(prompt, tokenizer)
        if tokens.ids[: len(ids)] != ids:
            raise ValueError(
                f"the prompt of turn {i} does not tokenize to the ids trained on before it; "
                "strip the space around the earlier answers"
            )
        pieces.append((_Piece(tokens.ids[len(ids) :], tokens.offsets[len(ids) :]), False, prompt))
        answer = _continue(tokens, prompt, full, tokenizer)
        pieces.append((answer, True, full))
        ids = tokens.ids + answer.ids
        done = full
    return pieces, turns[-1]


def _render(messages: Any, tokenizer: Any, generate: bool, template: Mapping[str, Any]) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template: set config.data.chat_template (tokenizer.chat_template), or give "
            "rows of prompt and completion"
        )
    # A table's columns hold None where a message lacks a key; the template must not see those.
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **template)
    except Exception as err:  # jinja's errors: the template refuses this order of roles
        roles = [m.get("role") for m in messages]
        raise ValueError(f"the chat template refuses turns {roles}: {err}") from err


def _tokenize(text: str, tokenizer: Any) -> _Piece:
    fast = getattr(tokenizer, "is_fast", False)
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    return _Piece(list(out["input_ids"]), list(out["offset_mapping"]) if fast else [])


def _continue(prompt: _Piece, before: str, full: str, tokenizer: Any) -> _Piece:
    """What follows the prompt in `full`, as ids that leave the prompt's ids as they are."""
    whole = _tokenize(full, tokenizer)
    n = len(prompt.ids)
    if whole.ids[:n] == prompt.ids:
        return _Piece(whole.ids[n:], whole.offsets[n:])
    # A token straddles the border ("A: " + "42"): train on what generation starts from.
    rest = _tokenize(full[len(before) :], tokenizer)
    if tokenizer.decode(prompt.ids + rest.ids) != tokenizer.decode(whole.ids):
        raise ValueError(
            f"prompt and answer do not tokenize apart at {full[len(before) - 8 :][:16]!r}; "
            "move the space between them into the answer"
        )
    return _Piece(rest.ids, [(a + len(before), b + len(before)) for a, b in rest.offsets])


def _end_of_turn(ids: Sequence[int], tokenizer: Any) -> int:
    """How many ids of an assistant piece count: up to its last eos, or special token, or all."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special}
    for stops in ({tokenizer.eos_token_id}, special):
        found = [n for n, i in enumerate(ids) if i in stops]
        if found:
            return found[-1] + 1
    return len(ids)


def _overlaps(piece: _Piece, text: str, begin: int, content: str, spans: Sequence[Span]) -> list[int]:
    if len(piece.offsets) != len(piece.ids):
        raise ValueError("spans need a fast tokenizer (one that returns character offsets)")
    core = content.strip()  # templates may trim
    at = text.find(core, begin)
    start = at - (len(content) - len(content.lstrip()))
    if not core or at < 0:
        raise ValueError("the chat template rewrites the assistant turn: its spans cannot be placed")
    inside = np.zeros(len(text) + 1, np.int32)
    for a, b in spans:
        inside[max(start + a, 0) : start + b] = 1
    return [int(inside[a:b].any()) for a, b in piece.offsets]
