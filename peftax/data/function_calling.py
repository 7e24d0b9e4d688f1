"""Function calling: the quickstart's task and its scores.

The data is the Berkeley Function-Calling Leaderboard's, out of its wheel (Apache-2.0). Single-turn,
one call a question. A row is a dict of id, category, question, tools (each with name, description
and a JSON schema), and `answer`: the function's name and, for each argument, the list of accepted
values ("" among them: the argument may be left out). The answer to learn is a JSON list with the
first accepted value of each argument.

The system message is the same for every row and a row's tools stand in its user turn: so prompts
with shots share their beginning, whose KV cache need be computed only once.
"""

import functools
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from peftax.data import asset

Row = dict[str, Any]
Message = dict[str, str]

FILES = ("multiple", "live_multiple", "simple_python", "live_simple")
SYSTEM = "Call the function that answers the question."
FORMAT = (
    " Answer with a JSON list that holds one call and nothing else, like "
    '[{"name":"function.name","arguments":{"parameter":"value"}}]. The functions are given as '
    "JSON: name, description and the type or the allowed values of each parameter. A parameter "
    "whose name ends in ? is optional (write its name without the ?): leave it out unless the "
    "question asks for it. No explanation, no code."
)
DESCRIBE = ("tools", "short", "full")


# ---- rows ----------------------------------------------------------------------------------------


def load(wheel: str | os.PathLike[str]) -> list[Row]:
    """The usable rows of the wheel, duplicate questions dropped (case and spacing aside).

    Rows whose own answer breaks their own rules (a required argument that has no value, a value for
    an unknown parameter) are left out: nobody could score on them.
    """
    rows: list[Row] = []
    asked: set[str] = set()
    dropped: Counter[str] = Counter()
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            answers = {a["id"]: a["ground_truth"] for a in _lines(archive, f"possible_answer/BFCL_v4_{name}")}
            for raw in _lines(archive, f"BFCL_v4_{name}"):
                row = _row(raw, answers.get(raw["id"]), name)
                key = normalize(row["question"]) if row else ""
                if row is None or not score(target(row), row)["match"]:
                    dropped["defective"] += 1
                elif key in asked:
                    dropped["duplicate"] += 1
                else:
                    asked.add(key)
                    rows.append(row)
    logging.info("%d rows of %s; left out: %s", len(rows), os.path.basename(wheel), dict(dropped))
    return rows


def normalize(question: str) -> str:
    """A question without the differences of case and spacing."""
    return " ".join(question.lower().split())


def split(rows: Sequence[Row], *, seed: int = 0, test: int = 240, valid: int = 100) -> dict[str, list[Row]]:
    """Train, valid and test without leaks.

    Rows that list a function of the same name fall into the same split: so no function that is
    asked for or offered in test was ever seen in training. Connected components of more than a
    sixth of `test` rows (the giant one holds 45% of all) train only. Test and valid keep the share
    of rows with two or more tools that all rows have, as far as the components allow.
    """
    parts = components(rows)
    share = float(np.mean([len(r["tools"]) > 1 for r in rows]))
    out: dict[str, list[Row]] = {"train": [], "valid": [], "test": []}
    order = np.random.default_rng(seed).permutation(len(parts))
    want = {k: {True: round(n * share), False: n - round(n * share)} for k, n in (("test", test), ("valid", valid))}
    for part in (parts[int(i)] for i in order):
        many = sum(len(r["tools"]) > 1 for r in part)
        to = "train"
        if len(part) <= max(test // 6, 1):
            for k, left in want.items():
                if many <= left[True] and len(part) - many <= left[False]:
                    to = k
                    left[True] -= many
                    left[False] -= len(part) - many
                    break
        out[to] += part
    for k in out:
        mixed = np.random.default_rng([seed, len(out[k])]).permutation(len(out[k]))
        out[k] = [out[k][int(i)] for i in mixed]
        logging.info(
            "%s: %d rows, %d with 2 or more tools",
            k,
            len(out[k]),
            sum(len(r["tools"]) > 1 for r in out[k]),
        )
    return out


def components(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in groups connected over the names of all functions they list; the largest first."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for row in rows:
        for tool in row["tools"]:
            parent[root(tool["name"])] = root(row["tools"][0]["name"])
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(root(row["tools"][0]["name"]), []).append(row)
    return sorted(groups.values(), key=lambda g: (-len(g), g[0]["id"]))


def _lines(archive: zipfile.ZipFile, name: str) -> list[dict[str, Any]]:
    text = archive.read(f"bfcl_eval/data/{name}.json").decode()
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _row(raw: Mapping[str, Any], answer: Any, category: str) -> Row | None:
    if not answer or len(answer) != 1 or len(raw["question"]) != 1:
        return None
    ((name, arguments),) = answer[0].items()
    # A few rows bring a system message of their own; it becomes the first lines of the question.
    question = "\n".join(m["content"].strip() for m in raw["question"][0])
    return {
        "id": raw["id"],
        "category": category,
        "question": question,
        "tools": raw["function"],
        "answer": {"name": name, "arguments": arguments},
    }


# ---- prompt and answer ---------------------------------------------------------------------------


def example(row: Row, *, describe: str = "tools", grouped: bool = False) -> dict[str, Any]:
    """The row as a chat to learn: `{"messages": [system, user, assistant]}`.

    `grouped` adds the spans of the argument values, for losses told apart.
    """
    answer = {"role": "assistant", "content": target(row)}
    chat: dict[str, Any] = {"messages": [*prompt(row, describe=describe), answer]}
    return {**chat, "spans": value_spans(row)} if grouped else chat


def prompt(row: Row, *, instructed: bool = False, shots: Sequence[Row] = (), describe: str = "tools") -> list[Message]:
    """The chat up to the answer.

    `instructed` says the answer's format in words, for models not tuned on it.
    """
    return [*prefix(instructed=instructed, shots=shots, describe=describe), _ask(row, describe)]


def prefix(*, instructed: bool = False, shots: Sequence[Row] = (), describe: str = "tools") -> list[Message]:
    """What the prompts of all rows begin with: the system message and the shots."""
    messages = [{"role": "system", "content": SYSTEM + (FORMAT if instructed else "")}]
    for shot in shots:
        messages += [_ask(shot, describe), {"role": "assistant", "content": target(shot)}]
    return messages


def pick_shots(train: Sequence[Row], count: int = 3) -> list[Row]:
    """The shortest training rows with 2 or more tools and arguments, all of different functions.

    Only rows whose values stand in the question: a shot should show the format, not a riddle.
    """

    def plain(row: Row) -> bool:
        values = [str(v).lower() for v in _first_arguments(row).values()]
        return len(values) > 1 and all(
            re.search(rf"(?<!\w){re.escape(v)}(?!\w)", row["question"].lower()) for v in values
        )

    able = [r for r in train if len(r["tools"]) > 1 and plain(r)]
    shots: list[Row] = []
    names: set[str] = set()
    for row in sorted(able, key=lambda r: (len(_ask(r, "full")["content"]) + len(target(r)), r["id"])):
        mine = {t["name"] for t in row["tools"]}
        if len(shots) < count and not mine & names:
            shots.append(row)
            names |= mine
    if len(shots) < count:
        raise ValueError(f"only {len(shots)} of {count} shots: too few plain training rows with 2 tools")
    return shots


def render_tools(tools: Sequence[Mapping[str, Any]], describe: str = "tools") -> str:
    """Tools as compact JSON.

    `describe` says how much is described: tools only, the parameters in short (their first
    sentence), or all in full. A parameter is its type, or the list of its allowed values; "?" after
    its name marks it as optional.
    """
    if describe not in DESCRIBE:
        raise ValueError(f"describe {describe!r} is none of: {', '.join(DESCRIBE)}")
    shown = [
        {
            "name": tool["name"],
            "description": tool["description"].strip(),
            "parameters": _parameters(tool["parameters"], describe),
        }
        for tool in tools
    ]
    return _dump(shown)


def target(row: Row) -> str:
    """The answer to learn: `[{"name":...,"arguments":{...}}]`, arguments in the tool's order."""
    call = {"name": row["answer"]["name"], "arguments": _first_arguments(row)}
    return _dump([call])


def value_spans(row: Row) -> list[tuple[int, int]]:
    """Character spans of the argument values in `target(row)`, without a string's quotes."""
    at = len(_dump([{"name": row["answer"]["name"], "arguments": {}}])) - len("}}]")
    spans = []
    for key, value in _first_arguments(row).items():
        at += len(_dump(key)) + len(":")
        text = _dump(value)
        quote = isinstance(value, str)
        if len(text) > 2 * quote:
            spans.append((at + quote, at + len(text) - quote))
        at += len(text) + len(",")
    return spans


def _ask(row: Row, describe: str) -> Message:
    return {
        "role": "user",
        "content": render_tools(row["tools"], describe) + "\n" + row["question"],
    }


def _parameters(schema: Mapping[str, Any], describe: str) -> dict[str, Any]:
    required = set(schema.get("required", ()))
    properties = schema.get("properties", {})
    return {k + ("" if k in required else "?"): _parameter(p, describe) for k, p in properties.items()}


def _parameter(schema: Mapping[str, Any], describe: str) -> Any:
    if schema.get("properties"):
        return _parameters(schema, describe)
    kind = schema.get("type", "any")
    items = schema.get("items") or {}
    if items.get("properties"):
        return [_parameters(items, describe)]
    if items:
        kind += " of " + items.get("type", "any")
    enum = schema.get("enum") or items.get("enum")
    words = "" if describe == "tools" else schema.get("description", "").strip()
    if describe == "short":
        words = re.split(r"(?<=[.;])\s", words)[0][:100]
    if not words:
        return enum or kind
    return f"{kind}: {words}" + (f" One of {_dump(enum)}" if enum else "")


def _first_arguments(row: Row) -> dict[str, Any]:
    answer = row["answer"]
    accepted = answer["arguments"]
    tool = next((t for t in row["tools"] if t["name"] == answer["name"]), None)
    order = list(tool["parameters"].get("properties", {})) if tool else []
    keys = [k for k in order if k in accepted] + [k for k in accepted if k not in order]
    return {k: _plain(accepted[k][0]) for k in keys if accepted[k] and accepted[k][0] != ""}


def _plain(value: Any) -> Any:
    """An accepted value, with each list of alternatives inside its dicts replaced by its first."""
    if isinstance(value, dict):
        first = {k: v[0] if isinstance(v, list) and v else v for k, v in value.items()}
        return {k: _plain(v) for k, v in first.items() if v != ""}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


# ---- scoring -------------------------------------------------------------------------------------


def score(text: str, row: Row) -> dict[str, bool]:
    """Whether an answer parses as calls, names the right function (once), and matches in full.

    The rules are those of the leaderboard's own checker, but that 3.0 passes for an integer 3.
    """
    calls = parse(text)
    if calls is None:
        return {"parse": False, "name": False, "match": False}
    right = len(calls) == 1 and calls[0]["name"] == row["answer"]["name"]
    return {"parse": True, "name": right, "match": right and _match(calls[0]["arguments"], row)}


def parse(text: str) -> list[dict[str, Any]] | None:
    """The first JSON call or list of calls in a text; None if there is none.

    Lenient in the baselines' favour: text or a code fence around it does not matter, and one call
    without its list will do. A call is an object with a "name" and an object of "arguments".
    """
    decoder = json.JSONDecoder()
    for start in re.finditer(r"[\[{]", text):
        try:
            value, _ = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            continue
        calls = value if isinstance(value, list) else [value]
        if calls and all(_is_call(c) for c in calls):
            return calls
    return None


def aggregate(scores: Iterable[Mapping[str, bool]], rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Rates of parse, name and match: of all rows, of those with one tool, of those with 2+."""
    pairs = list(zip(scores, rows, strict=True))
    chosen = {
        "all": pairs,
        "one tool": [p for p in pairs if len(p[1]["tools"]) < 2],
        "2+ tools": [p for p in pairs if len(p[1]["tools"]) > 1],
    }
    return {
        name: {
            "rows": len(some),
            **{k: float(np.mean([s[k] for s, _ in some])) for k in ("parse", "name", "match")},
        }
        for name, some in chosen.items()
        if some
    }


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("arguments"), dict)


def _match(given: Mapping[str, Any], row: Row) -> bool:
    accepted = row["answer"]["arguments"]
    schema = next((t["parameters"] for t in row["tools"] if t["name"] == row["answer"]["name"]), {})
    properties = schema.get("properties", {})
    if not set(given) <= set(properties):
        return False
    # "" among the accepted values means "left out"; given in words it is a value, of strings only.
    if any(v == "" and properties[k].get("type") not in ("string", "any") for k, v in given.items()):
        return False
    if not set(schema.get("required", ())) <= set(given):
        return False
    return _match_keys(given, accepted)


def _match_keys(given: Mapping[str, Any], accepted: Mapping[str, Any]) -> bool:
    for key, value in given.items():
        if key not in accepted:
            return False
        choices = accepted[key] if isinstance(accepted[key], list) else [accepted[key]]
        if not any(_same(value, choice) for choice in choices):
            return False
    return all(isinstance(v, list) and "" in v for k, v in accepted.items() if k not in given)


def _same(value: Any, choice: Any) -> bool:
    if isinstance(choice, dict):
        return isinstance(value, dict) and _match_keys(value, choice)
    if isinstance(choice, list):
        return (
            isinstance(value, list)
            and len(value) == len(choice)
            and all(_same(v, c) for v, c in zip(value, choice, strict=True))
        )
    if isinstance(choice, str):
        return isinstance(value, str) and _loose(value) == _loose(choice)
    if isinstance(choice, bool) or isinstance(value, bool) or choice is None:
        return value is choice
    return isinstance(value, int | float) and value == choice


def _loose(text: str) -> str:
    """As lenient as the leaderboard's own checker: no case, no spaces or , . / - _ * ^."""
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


# ---- as a task of a config -----------------------------------------------------------------------


@functools.cache
def splits(seed: int = 0) -> dict[str, list[Row]]:
    """Train, valid and test rows; fetches the pinned wheel once."""
    return split(load(asset.fetch(*asset.BFCL)), seed=seed)


def examples(name: str) -> list[dict[str, Any]]:
    """The chats of a split, as `config.data.task` reads them."""
    return [example(row, grouped=True) for row in splits()[name]]
