"""A sweep as something to look at: Markdown, one HTML page, a picture and a CSV file for each figure, a LaTeX table."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from peftax import results, sweep
from peftax.report.figures import FIGURES, close
from peftax.results import Choice

WHERE = {
    "": "inside",
    "low": "still at the edge: the lowest",
    "high": "still at the edge: the highest",
    "only": "only one",
    "none": "none finished",
}

OWN = ("learning rate", "trials", "valid", "test", "trainable", "seconds")  # columns of what was chosen
BAR = r"\|"  # a bar in a cell of Markdown


def write(folder: str | Path, into: str | Path | None = None, *, title: str | None = None) -> Path:
    """Write the report of a sweep's folder: report.md, index.html, table.tex, figures as PNG and SVG, their CSV files.

    Args:
      into: by default FOLDER/report.

    Returns:
      the page, index.html.
    """
    folder = Path(folder)
    into = Path(into or folder / "report")
    into.mkdir(parents=True, exist_ok=True)
    table = results.load(folder)
    finished = table[table.status.isin(sweep.ENDED)]
    if finished.empty:
        raise ValueError(f"{folder}: no member is finished; there is nothing to report")
    table.drop(columns="folder").to_csv(into / "members.csv", index=False)
    choices = results.choose(finished) if "valid" in finished and finished.valid.notna().any() else []
    parts: list[tuple[str, str | Path]] = [("Members", status_text(table))]
    if choices:
        chosen = choice_table(choices, finished)
        chosen.to_csv(into / "chosen.csv", index=False)
        (into / "table.tex").write_text(latex(chosen))
        parts.append(("What was chosen on valid", markdown(chosen)))
    for name, heading, what, draw in FIGURES:
        data = what(finished, choices)
        if data is None or data.empty:
            continue
        data.to_csv(into / f"{name}.csv", index=False)
        figure = draw(data)
        for kind in ("png", "svg"):
            figure.savefig(into / f"{name}.{kind}", dpi=120)
        close(figure)
        parts.append((heading, into / f"{name}.png"))
    failed = table[table.status == "failed"]
    if not failed.empty:
        lines = [f"- {row['name']}: {sweep.error(Path(row['folder']))}" for row in failed.to_dict("records")]
        parts.append(("What failed", "\n".join(lines)))
    title = title or folder.name
    (into / "report.md").write_text(as_markdown(title, parts))
    page = into / "index.html"
    page.write_text(as_html(title, parts))
    return page


def status_text(table: pd.DataFrame) -> str:
    counts = table.status.value_counts()
    return ", ".join(f"{n} {status}" for status, n in counts.items()) + f" of {len(table)}."


def choice_table(choices: Sequence[Choice], table: pd.DataFrame) -> pd.DataFrame:
    """A row for each arm: the chosen learning rate and where in its grid, valid over seeds, size, time."""
    keys = dict.fromkeys(key for c in choices for key in c.arm)
    rows, short = [], sweep.short_names({*OWN, *keys})
    for c in choices:
        own = table[table.name.isin(c.members)]
        row: dict[str, Any] = {
            **{short[key]: c.arm.get(key, math.nan) for key in keys},
            **({} if math.isnan(c.rate) else {"learning rate": c.rate, "in its grid": WHERE[c.edge]}),
            "trials": c.trials,
            "valid": c.valid,
            "± (seeds)": spread(c.seeds),
        }
        if c.read:
            test = own.test.dropna()
            row |= {"test": test.mean(), "± (test)": spread(test), "rates read": c.read}
        measured = (column for column in own if str(column).startswith("metrics."))
        for column in ("test_accuracy", "trainable", "seconds", "peak_bytes", *measured):
            if column in own and own[column].notna().any():
                name = str(column).removeprefix("metrics.")
                row[column if name in row else name] = own[column].mean()
        rows.append(row)
    found = pd.DataFrame(rows).sort_values("valid", ignore_index=True)
    if "peak_bytes" in found:
        found["peak GiB"] = (found.pop("peak_bytes") / 2**30).round(2)
    return found


def spread(values: Sequence[float]) -> str:
    """ "0.0123 (3)": the deviation of single values, and how many there are."""
    n = len(values)
    return f"{np.std(values, ddof=1):.4f} ({n})" if n > 1 else f"({n})"


# --- pages ----------------------------------------------------------------------------------------


def cells(table: pd.DataFrame) -> list[list[str]]:
    """The text of each cell; numbers short."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            whole = value.is_integer() and abs(value) < 1e15
            return "" if math.isnan(value) else f"{value:,.0f}" if whole and abs(value) >= 10 else f"{value:.5g}"
        return f"{value:,}" if isinstance(value, int | np.integer) else " ".join(str(value).split())

    return [[text(v) for v in row] for row in table.astype(object).values.tolist()]


def markdown(table: pd.DataFrame) -> str:
    numeric = [pd.api.types.is_numeric_dtype(table[c]) for c in table]
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "|".join("--:" if n else "---" for n in numeric) + "|"]
    rows = ([cell.replace("|", BAR) for cell in row] for row in cells(table))
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def latex(table: pd.DataFrame) -> str:
    """The table for a paper, booktabs."""
    words = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$"}
    escape = str.maketrans({c: f"\\{c}" for c in "%_&#${}"} | words)
    rows = [" & ".join(c.translate(escape) for c in row) + r" \\" for row in (list(table.columns), *cells(table))]
    kinds = "".join("r" if pd.api.types.is_numeric_dtype(table[c]) else "l" for c in table)
    head, *body = rows
    return "\n".join(
        [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""]
    )


def as_markdown(title: str, parts: Sequence[tuple[str, str | Path]]) -> str:
    lines = [f"# {title}", ""]
    for heading, what in parts:
        body = f"![{heading}]({what.name}) ([data]({what.stem}.csv))" if isinstance(what, Path) else what
        lines += [f"## {heading}", "", body, ""]
    return "\n".join(lines)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums } img { max-width: 100% } h2 { margin-top: 2rem }
"""


def as_html(title: str, parts: Sequence[tuple[str, str | Path]]) -> str:
    """One page that needs nothing else: pictures stand in it."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, what in parts:
        body.append(f"<h2>{html.escape(heading)}</h2>")
        if isinstance(what, Path):
            picture = base64.b64encode(what.read_bytes()).decode()
            body.append(f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{picture}">')
        elif what.startswith("|"):
            body.append(_html_table(what))
        else:
            body.append("<p>" + "<br>".join(html.escape(line) for line in what.splitlines()) + "</p>")
    inside = "\n".join(body)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>\n{inside}\n</body></html>\n"


def _html_table(text: str) -> str:
    head, align, *rows = (
        [c.strip().replace(BAR, "|") for c in re.split(r"(?<!\\)\|", line.strip("|"))] for line in text.splitlines()
    )
    right = [a.endswith(":") for a in align]
    first = "".join(f"<th>{html.escape(c)}</th>" for c in head)
    rest = [
        "<tr>"
        + "".join(f"<td{' class=n' * r}>{html.escape(c)}</td>" for c, r in zip(row, right, strict=True))
        + "</tr>"
        for row in rows
    ]
    return f"<table><tr>{first}</tr>{''.join(rest)}</table>"
