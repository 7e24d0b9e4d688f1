"""Where rows come from: a hub data set, a local file or folder, a list. Never remote code."""

import difflib
import os
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
}


def load(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    *,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    progress: bool = True,
) -> Sequence[Mapping[str, Any]]:
    """A list-like of dict rows.

    A local JSONL, Parquet or CSV file is one split, "train", of which slices such as "train[:90%]"
    can be asked. `name` is a hub data set's configuration. An in-memory list is returned as it is,
    whatever the split. Without `progress` nothing is shown of it, now and later.
    """
    if not isinstance(source, str | os.PathLike):
        rows: Any = source if isinstance(source, Sequence) or hasattr(source, "features") else list(source)
        if len(rows) and not isinstance(rows[0], Mapping):
            raise ValueError(f"rows must be dicts, the first is a {type(rows[0]).__name__}")
        return _filled(rows, "the given list", split)
    text = os.fspath(source)
    path = Path(text).expanduser()
    kind = FORMATS.get(path.suffix.lower())
    if not path.exists() and (kind or text.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"no data file at {text}{_nearest(path)}")
    if path.is_file() and kind is None:
        raise ValueError(f"{text}: cannot read {path.suffix or 'a file without suffix'}; use {', '.join(FORMATS)}")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{text} is empty: it has no rows")
    import datasets  # takes seconds

    if not progress:
        datasets.disable_progress_bars()
    try:
        if kind and path.is_file():
            rows = datasets.load_dataset(kind, data_files=str(path), split=split, cache_dir=cache_dir)
        elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(str(path))  # written by save_to_disk
            if isinstance(rows, datasets.DatasetDict):
                if split not in rows:
                    raise ValueError(f"split {split!r} is none of: {', '.join(map(str, rows))}")
                rows = rows[split]
        else:
            rows = datasets.load_dataset(text, name, split=split, revision=revision, cache_dir=cache_dir)
    except Exception as err:  # of datasets, pyarrow or the network: many kinds, one meaning for the user
        cause = err
        while cause.__cause__ is not None:  # datasets says only that there was one
            cause = cause.__cause__
        first = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise ValueError(f"cannot load split {split!r} of {text}: {first}") from err
    return _filled(rows, text, split)


def templated(
    rows: Iterable[Mapping[str, Any]], prompt: str | Sequence[str] | None, completion: str | None
) -> list[dict[str, Any]]:
    """Rows of `prompt` and `completion` (and their task_id), made of other columns.

    Args:
      prompt: text with columns in braces, "Q: {question}\\nA:", two for a brace itself; of several the first whose
        columns are all filled.
      completion: the same.
    """
    if prompt is None or completion is None:
        raise ValueError("config.data.prompt and config.data.completion belong together: give both templates")
    prompts = [(p, _columns(p)) for p in ((prompt,) if isinstance(prompt, str) else prompt)]
    answers = _columns(completion)
    made = []
    for number, row in enumerate(rows):
        text, wanted = next((p for p in prompts if all(row.get(c) not in (None, "") for c in p[1])), prompts[-1])
        for column in (*wanted, *answers):
            if column not in row:
                near = difflib.get_close_matches(column, row, n=1, cutoff=0.0)
                raise ValueError(
                    f"a template asks for the column {column!r}, rows have {sorted(row)}; nearest: {near[0]!r}"
                )
            if row[column] is None:
                raise ValueError(
                    f"row {number} holds nothing in {column!r}, which a template asks for; fill it, leave the row out, "
                    "or give several prompts, the last without it"
                )
        more = {"task_id": row["task_id"]} if row.get("task_id") is not None else {}
        made.append({"prompt": text.format_map(row), "completion": completion.format_map(row), **more})
    return made


def _columns(template: str) -> list[str]:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        if any(not name or name.isdigit() for name in names):
            raise ValueError("braces hold no column's name")
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; a brace that is text is written twice") from None
    return names


def _filled(rows: Any, what: str, split: str) -> Any:
    if len(rows) == 0:
        raise ValueError(f"{what}: split {split!r} is empty: it has no rows")
    return rows


def _nearest(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {folder / near[0]}?" if near else ""
