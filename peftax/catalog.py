"""The methods as their files describe them: a table of all, a page of one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import ModuleType

from peftax import methods
from peftax.methods import inits

COLUMNS = {
    "method": lambda file: f"`{_name(file)}`",
    "": lambda file: about(file),
    "trains": lambda file: _said(file, r"Trainable ?((?:per \w+)?: .*?)\.(?:\n| [A-Z])").lstrip(": "),
    "folds": lambda file: "no" if _made(file).fold is None else "yes",
    "needs of the base": lambda file: _made(file).needs,
    "learning rate": lambda file: _said(file, r"Learning rate: (.*?)[ ;,]*\(").rstrip(".,; "),
    "PEFT type": lambda file: f"`{file.HF.peft_type}`" if hasattr(file, "HF") else "",
    "source": lambda file: _paper(file),
}


def tables() -> str:
    """Markdown: every method, then every start of LoRA's factors."""
    files = [methods.module(name) for name in methods.names()]
    starts = [inits.module(name) for name in inits.names()]
    of_starts = {
        "init": COLUMNS["method"],
        "": about,
        "moves the base": lambda file: "yes" if file.MOVES else "no",
        "source": _paper,
    }
    parts = ["# Methods", "", *_rows(COLUMNS, files), "", "## LoRA's `init`", "", *_rows(of_starts, starts)]
    return "\n".join(parts)


def with_short_table(text: str) -> str:
    """A page whose part between <!-- methods --> and <!-- /methods --> is the table of all in a few columns."""
    few = {column: COLUMNS[column] for column in ("method", "", "folds", "PEFT type")}
    rows = "\n".join(_rows(few, [methods.module(name) for name in methods.names()]))
    before, begin, rest = text.partition("<!-- methods -->\n")
    _, end, after = rest.partition("<!-- /methods -->")
    if not (begin and end):
        raise ValueError("the page has no <!-- methods --> ... <!-- /methods -->")
    return f"{before}{begin}\n{rows}\n\n{end}{after}"


def page(name: str) -> str:
    """One method whole: its text, its settings with what they mean, what it needs of the base, its PEFT type."""
    file = methods.module(name)
    source = inspect.getsource(getattr(file, name))
    settings = re.findall(r"^    (\w+)(?::[^=\n]*)?(= [^#\n]*?)?,(?:  # (.*))?$", source.partition("->")[0], re.M)
    lines = [file.__doc__.rstrip(), "", "Settings (config.method.*):"]
    wide = max((len(f"{key} {value}") for key, value, _ in settings), default=0)
    lines += [f"  {f'{key} {value}':<{wide}}  {text}".rstrip() for key, value, text in settings]
    form = getattr(file, "HF", None)
    lines += [
        "",
        f"Needs of the base: {_made(file).needs}. Folds: {COLUMNS['folds'](file)}. "
        + (
            f"Hugging Face PEFT type: {form.peft_type}."
            if form
            else "No Hugging Face PEFT type: saved as peftax_adapter.json."
        ),
    ]
    return "\n".join(lines)


def about(file: ModuleType) -> str:
    """The first line of a file's text."""
    return (file.__doc__ or "").partition("\n")[0].rstrip(".").replace("|", "\\|")


def _rows(columns, files) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |".replace("|  |", "| |")
    yield "|---" * len(columns) + "|"
    for file in files:
        yield f"| {' | '.join(cell(file) for cell in columns.values())} |"


def _name(file: ModuleType) -> str:
    return file.__name__.rpartition(".")[2]


def _made(file: ModuleType):
    return methods.make(_name(file))


def _said(file: ModuleType, pattern: str) -> str:
    found = re.search(pattern, file.__doc__ or "", re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def _paper(file: ModuleType) -> str:
    """The first link of a file's text."""
    found = re.search(r"https?://[^\s,;)]+", file.__doc__ or "")
    return f"[{found[0].rsplit('/', 1)[-1].rstrip('.')}]({found[0].rstrip('.')})" if found else ""
