"""What is compared, and how a side talks: one line of JSON in, one out, so that only one of them computes at a time.

in:   {"do": "load"}   {"do": "check", "tokens": 1}   {"do": "run", "tokens": 1, "case": "8 adapters"}
out:  {"seconds": ...}, and at the check how far rows lie from their adapters alone, or from peftax's
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 16
RANKS = (8, 4, 16, 8)  # adapter i has rank RANKS[i % 4], alpha 16
ADAPTERS = 16
ONE = "one adapter"  # the first, for all rows, as it is run without any mixing
CASES = {ONE: None, "2 adapters": 2, "8 adapters": 8, "16 adapters": 16}  # row i takes adapter i modulo this number
CHECKED = 8
TARGETS = {  # adapter i has the targets i modulo how many there are
    "attention": (
        (["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]),
        "q, v and q, k, v, o in turn",
    ),
    "all": (("all-linear",), "all linear layers"),
}


def which(case: str) -> np.ndarray:
    """The adapter of every row."""
    return np.arange(BATCH, dtype=np.int32) % (CASES[case] or 1)


def tokens(inputs: Path, length: int) -> np.ndarray:
    return np.load(inputs / "tokens.npy")[:, :length]


def serve(
    load: Callable[[dict[str, Any], Path], Callable[[str, np.ndarray], np.ndarray]], *, first: bool = False
) -> None:
    """Answer lines until the input ends.

    Args:
      load: (what inputs.json holds, the folder) -> run(case, int32 [rows, length]) -> logits of the last token
        [rows, vocabulary]; a case "3" is adapter 3 alone for all rows.
      first: this side's logits are kept, others' are compared with them.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to stderr
    inputs = Path(sys.argv[1])
    run: Callable[[str, np.ndarray], np.ndarray] | None = None
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        if order["do"] == "load":
            run = load(json.loads((inputs / "inputs.json").read_text()), inputs)
        elif order["do"] == "check":
            assert run is not None
            answer = _check(run, inputs, order["tokens"], first)
        else:
            assert run is not None
            ids = tokens(inputs, order["tokens"])
            began = time.perf_counter()
            run(order["case"], ids)
            answer["seconds"] = time.perf_counter() - began
        out.write(json.dumps(answer) + "\n")


def _check(run, inputs: Path, length: int, first: bool) -> dict[str, float]:
    ids, case = tokens(inputs, length), f"{CHECKED} adapters"
    mixed = {each: run(each, ids) for each in CASES}[case]  # every case once: what compiles does it now
    found: dict[str, float] = {}
    if first:
        expect = np.zeros_like(mixed)
        for i in range(CHECKED):
            rows = which(case) == i
            expect[rows] = run(str(i), ids[rows])
        found["row"] = float(np.abs(mixed - expect).max() / np.abs(expect).max())
    file = inputs / f"logits_{length}.npy"
    if first:
        np.save(file, mixed)
    elif file.exists():
        theirs = np.load(file)
        found["between"] = float(np.abs(mixed - theirs).max() / np.abs(theirs).max())
    return found
