"""Checkpoints of a run: all that is not the untouched base, through Orbax; another base is refused."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from peftax import processes


class Checkpoints:
    """The numbered checkpoints of one folder; a half-written or damaged one is never loaded, the oldest make room."""

    def __init__(self, folder: str | Path, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self.folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, arrays: Any, facts: Mapping[str, Any]) -> None:
        """arrays: a pytree; facts: JSON (data position, the base's fingerprint, the best so far). Each process writes
        its own shards.
        """
        facts = {**facts, "checksum": checksum(arrays)}
        self._manager.save(
            step,
            args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), facts=ocp.args.JsonSave(facts)),
        )

    def restore(self, like: Any, *, base: str) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, arrays in the shapes and shardings of `like`, facts) of the newest whole checkpoint; None of none.

        The mesh and the number of processes may be others than those that saved. A damaged one is named in a warning
        and moved beside the folder, so that its step can be saved again.

        Raises:
          ValueError: the checkpoint stands on another base, or there are checkpoints and none is whole.
        """
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                facts, arrays = self._read(step, like, base)
            except (_OtherBase, MemoryError, PermissionError):
                raise
            except Exception as error:  # Orbax meets a damaged file with many kinds
                if processes.lost(error):
                    raise
                damaged[step] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            if processes.anyone(step in damaged):
                damaged.setdefault(step, "another process could not read its part")
                continue
            for bad, why in damaged.items():
                self._move_away(bad, why, step)
            return step, arrays, facts
        if damaged:
            step, why = next(iter(damaged.items()))
            raise ValueError(
                f"{self.folder}: no checkpoint is whole, of {len(damaged)}; of the newest, {step}: {why}. Put back a "
                "copy of one, or start in a new workdir"
            )
        return None

    def _read(self, step: int, like: Any, base: str) -> tuple[dict[str, Any], Any]:
        facts = self._manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore())).facts
        if facts["base"] != base:
            raise _OtherBase(
                f"checkpoint {step} was trained on another base (fingerprint {facts['base'][:12]}, this one "
                f"{base[:12]}): give it the base it was trained on, or start in a new workdir"
            )
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        arrays = self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target))).arrays
        if checksum(arrays) != facts.pop("checksum"):
            raise ValueError("its numbers are not those that were saved: the checksum does not match")
        return facts, arrays

    def _move_away(self, step: int, why: str, instead: int) -> None:
        if processes.first():
            beside = self.folder.with_name(f"{self.folder.name}.damaged")
            beside.mkdir(exist_ok=True)
            into = next(p for n in range(10**6) if not (p := beside / f"{step}{f'.{n}' if n else ''}").exists())
            (self.folder / str(step)).rename(into)
            logging.warning(
                "%s is damaged (%s): moved to %s, going on from step %d", self.folder / str(step), why, into, instead
            )
        processes.wait(f"{step} is moved")
        self._manager.reload()

    def close(self) -> None:
        self._manager.close()


class _OtherBase(ValueError):
    pass


def checksum(arrays: Any) -> int:
    """Of every number of a tree, however it lies. Files that end early or vanish may else be read as zeros."""
    found = 0
    for x in jax.tree.leaves(arrays):
        for part in processes.parts(x):
            found = zlib.crc32(np.ascontiguousarray(part).reshape(-1).view(np.uint8), found)
    return found
