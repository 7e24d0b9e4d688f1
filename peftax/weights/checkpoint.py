"""Checkpoints of a run: all that is not the untouched base, through Orbax; another base is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The numbered checkpoints of one folder; a half-written one is never seen, the oldest make room."""

    def __init__(self, folder: str | Path, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, arrays: Any, facts: Mapping[str, Any]) -> None:
        """arrays: a pytree; facts: JSON (data position, the base's fingerprint, the best so far)."""
        self._manager.save(
            step,
            args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), facts=ocp.args.JsonSave(dict(facts))),
        )

    def restore(self, step: int, like: Any, *, base: str) -> tuple[Any, dict[str, Any]]:
        """(arrays in the shapes and shardings of `like`, facts).

        Raises ValueError where the checkpoint stands on another base, or on other shapes.
        """
        facts = self._manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore())).facts
        if facts["base"] != base:
            raise ValueError(
                f"checkpoint {step} was trained on another base (fingerprint {facts['base'][:12]}, this one "
                f"{base[:12]}): give it the base it was trained on, or start in a new workdir"
            )
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        arrays = self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target))).arrays
        return arrays, facts

    def close(self) -> None:
        self._manager.close()
