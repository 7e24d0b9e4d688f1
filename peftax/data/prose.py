"""Plain English that no fine-tuning is about, to see what training forgets: `peftax sweep --measure general=prose`.

The text is In the Year 2889 by Michel and Jules Verne (1889, public domain), out of the wheel of reasoning-gym
(Apache-2.0), without Project Gutenberg's notes before and behind it. A row is some paragraphs, all of which counts.
"""

import os
import re
import zipfile

from peftax.data import asset

FILE = "reasoning_gym/data/in_the_year_2889.txt"
BEGINS, ENDS = "\nIN THE YEAR 2889.\n", "\nEnd of Project Gutenberg"
LONG = 2000  # characters of a row at least: some 450 tokens


def load(wheel: str | os.PathLike[str]) -> list[str]:
    """The story's paragraphs, each on one line."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(FILE).decode("utf-8-sig").replace("\r\n", "\n")
    _, begins, text = text.partition(BEGINS)
    text, ends, _ = text.partition(ENDS)
    if not begins or not ends:
        raise ValueError(f"{wheel}: {FILE} is not the text that was pinned")
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def examples(split: str) -> list[dict[str, str]]:
    """Rows of "test", the one split there is: nobody should train on it."""
    if split != "test":
        raise ValueError(f"prose has no split {split!r}, only test: it is there to be measured on")
    rows, at = [], []
    for paragraph in load(asset.fetch(*asset.REASONING_GYM)):
        at.append(paragraph)
        if sum(map(len, at)) >= LONG:
            rows, at = [*rows, "\n\n".join(at)], []
    return [{"prompt": "", "completion": text} for text in [*rows, *(["\n\n".join(at)] if at else [])]]
