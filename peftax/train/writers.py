"""Where metrics go: a line of JSON each, TensorBoard, or several of them behind one small interface."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Writer(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Jsonl:
    """One JSON object a line. Opened on a run that goes on, it drops the lines after that step."""

    def __init__(self, path: str | Path, *, resume_step: int = 0):
        self.path = Path(path)
        kept = [line for line in _lines(self.path) if json.loads(line)["step"] <= resume_step]
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text("".join(f"{line}\n" for line in kept if resume_step))
        os.replace(part, self.path)
        self._file = self.path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        clean = {k: _number(v) for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard."""

    def __init__(self, folder: str | Path, *, resume_step: int = 0):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        self._writer.close()


class All:
    """Any number of writers as one; none of them in a process that is not the first."""

    def __init__(self) -> None:
        self._writers: list[Writer] = []

    def add(self, writer: Writer) -> None:
        self._writers.append(writer)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; a last line that a kill cut short is dropped."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


def _number(value: float) -> float | int | None:
    value = float(value)
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
