"""Does an adapter give the logits that it gave elsewhere?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftax import models
from peftax.core import injection, sites, tree
from peftax.core.hf import Unsupported
from peftax.core.method import Ctx, check_tasks
from peftax.weights import adapters, base, source


@dataclasses.dataclass(frozen=True)
class Result:
    """Largest |ours - expected| over the logits, and the largest |expected - base|."""

    case: str
    difference: float = float("nan")
    effect: float = float("nan")
    skipped: str = ""


def one(
    base_path: str | Path,
    adapter: str | Path,
    inputs: str | Path,
    expect: str | Path,
    *,
    tasks: Sequence[int] | None = None,
) -> Result:
    """Compare one adapter; base and adapter are folders, inputs and expect .npy files, tasks each row's task."""
    return _compare(_open(base_path), adapter, _array(inputs), _array(expect), tasks)


def cases(folder: str | Path, *, only: Sequence[str] | None = None) -> list[Result]:
    """Every case of a folder: base_model.safetensors, config.json and input_ids.npy in it, one adapter folder
    with logits.npy a case. A cases.json, {"cases": [{"case", "task_ids"}]}, says each row's task, where it matters.

    Cases of methods that are not supported come back as skipped, with the reason.
    """
    folder = Path(folder)
    files = (p for file in (adapters.PEFT_CONFIG, adapters.OWN_CONFIG) for p in folder.glob(f"*/{file}"))
    found = sorted({p.parent.name for p in files})
    if not found:
        raise FileNotFoundError(f"{folder}: holds no CASE/adapter_config.json")
    for name in only or ():
        if name not in found:
            raise ValueError(f"{folder}: no case {name!r}; the nearest: {tree.nearest(name, found)}")
    opened = _open(folder / "base_model.safetensors")
    inputs = _array(folder / "input_ids.npy")
    listed = source.read_json(folder / "cases.json")["cases"] if (folder / "cases.json").exists() else ()
    tasks = {c["case"]: c.get("task_ids") for c in listed}
    results = []
    for name in only or found:
        try:
            results.append(
                _compare(opened, folder / name, inputs, _array(folder / name / "logits.npy"), tasks.get(name))
            )
        except Unsupported as error:
            results.append(Result(name, skipped=str(error)))
    return results


def _open(path: str | Path) -> tuple[Any, dict[str, Any], sites.Sites]:
    opened = source.open(path)
    model = models.build(opened.config, scan=False)
    shapes = models.abstract(model)
    found = sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    return model, base.load(opened, shapes), found


def _compare(opened, adapter: str | Path, inputs: np.ndarray, expect: np.ndarray, tasks=None) -> Result:
    model, params, found = opened
    method, part, _ = adapters.load(adapter, params, found)
    rows = inputs.shape[1]
    plain = model.apply({"params": params}, inputs)
    if tasks is not None:
        check_tasks(method, tasks)
    ctx = Ctx() if tasks is None else Ctx(tasks=jnp.asarray(tasks, jnp.int32))
    ours = injection.inject(model.apply, method)({"params": tree.merge(*part)}, inputs, ctx=ctx)[:, -rows:]
    expect = expect[:, -rows:]
    if ours.shape != expect.shape:
        raise ValueError(f"{adapter}: expected logits have shape {expect.shape}, ours {ours.shape}")
    return Result(
        Path(adapter).name,
        float(np.max(np.abs(np.asarray(ours) - expect))),
        float(np.max(np.abs(expect - np.asarray(plain)))),
    )


def _array(path: str | Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path}: is no whole .npy file ({error})") from None
    return array.astype(np.int32) if np.issubdtype(array.dtype, np.integer) else array
