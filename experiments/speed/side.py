"""How a contender talks: one line of JSON in, one out, so that only one of them computes at a time.

in:   {"do": "load"}   {"do": "step", "number": 3}   {"do": NAME, ...}: what its step has besides   {"do": "stop"}
out:  {"seconds": ..., "loss": ...} and, at the stop, what memory it took
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WARM = 2  # the first steps compile; memory is measured anew after them


def arguments(**more: Any) -> argparse.Namespace:
    """The arguments of every contender, and its own as name=default."""
    parser = argparse.ArgumentParser()
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapter", default="adapter", help="its folder, below inputs")
    for name, default in more.items():
        parser.add_argument(f"--{name}", default=default, type=type(default))
    return parser.parse_args()


def inputs(args: argparse.Namespace) -> dict[str, Any]:
    """What inputs.json holds."""
    return json.loads((args.inputs / "inputs.json").read_text())


def serve(
    args: argparse.Namespace, load: Callable[[argparse.Namespace, dict[str, Any]], Callable[[np.ndarray], float]]
) -> None:
    """Answer lines until "stop".

    Args:
      load: (args, what inputs.json holds) -> step(int32 [rows, length + 1]) -> loss. What it imports should be imported
        before, since memory is counted from here.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to stderr
    told = inputs(args)
    batches = np.load(args.inputs / "tokens.npy")
    before, step, steps = _memory("VmRSS"), None, 0
    whole = 0
    for line in sys.stdin:
        order = json.loads(line)
        do = order.pop("do")
        began = time.perf_counter()
        answer: dict[str, Any] = {}
        if do == "load":
            step = load(args, told)
        elif do == "step":
            answer["loss"] = step(batches[order["number"] % len(batches)])
            steps += 1
        elif do != "stop":
            answer["said"] = getattr(step, do)(**order)
        answer["seconds"] = time.perf_counter() - began
        if steps == WARM and do == "step":
            whole = _memory("VmHWM")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        if do == "stop":
            peak = _memory("VmHWM")
            answer |= {
                "before": before,
                "peak": max(whole, peak) - before,
                "peak_later": peak - before,
                "after": _memory("VmRSS") - before,
            }
        out.write(json.dumps(answer) + "\n")
        if do == "stop":
            return


def _memory(field: str) -> float:
    """GiB of this process: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) / 2**20
