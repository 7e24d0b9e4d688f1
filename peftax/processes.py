"""Several processes that run one program: how they find one another, what each holds, where they wait, how they end.

With one process each function is the plain thing: nothing is sent, nobody waits.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT = 60  # seconds without a sign of life after which a process counts as dead, and all others end
ALONE = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")  # "1": no cluster, where JAX would see one and take one GPU of several
NO_CLUSTER = (  # what JAX says where it finds none, and where this program has begun by itself
    "coordinator_address should be defined",
    "jax.distributed.initialize() must be called before",
)
SIGNS = ("Gloo", "NCCL", "coordination service", "heartbeat", "Barrier", "barrier", "Connection", "UNAVAILABLE")


def start(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Join the run's other processes, before anything touches a device.

    Args:
      coordinator: HOST:PORT that process 0 listens on. With None JAX asks the environment (Slurm, GKE and TPU VMs,
        Open MPI); where that knows of none, or count is 1, this process is the run.
      count, index: how many processes there are, and which this one is.
    """
    given = {"coordinator": coordinator, "processes": count, "process": index}
    if None in given.values():
        if any(v is not None for v in given.values()) and count != 1:
            lacking = ", ".join(f"--{k}" for k, v in given.items() if v is None)
            raise ValueError(f"several processes by hand want {lacking} too; give none of them where a cluster says it")
        if count == 1 or any(os.environ.get(name) == "1" for name in ALONE):
            return
    elif coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"--coordinator={coordinator} names no port; want HOST:PORT, of the host of process 0")
    # JAX's own way to stop together misses a signal that comes before the first step of a run that goes on
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            cluster_detection_method="deactivate" if coordinator else None,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, RuntimeError, OSError) as error:
        if coordinator is None and str(error).startswith(NO_CLUSTER):
            return
        if isinstance(error, ValueError):
            raise
        raise ConnectionError(
            f"could not join the run's other processes: {_line(error)}. Start all of them within five minutes; for a "
            "run of one process in spite of the environment give --processes=1"
        ) from error


def several() -> bool:
    """Has this process joined others?"""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Is this the process that writes what is written once, and talks?"""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Until every process has come here."""
    if several():
        multihost_utils.sync_global_devices(name)


def anyone(yes: bool) -> bool:
    """Does any process say yes? All have to ask, and all hear the same."""
    return bool(np.any(multihost_utils.process_allgather(np.asarray(yes)))) if several() else yes


def put(tree: Any, places: Any) -> Any:
    """Arrays on the shards of `places`: those that each process holds whole, and those that lie over all."""

    def one(x: Any, place: jax.sharding.Sharding) -> jax.Array:
        if place.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, place)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, place, lambda index: host[index])

    return jax.tree.map(one, tree, places)


def spread(x: Any) -> bool:
    """Do other processes hold numbers of this array that this one lacks?"""
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)


def whole(x: Any) -> np.ndarray:
    """An array on this host, also of shards that other processes hold. All have to ask."""
    if spread(x):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(jax.device_get(x))


def parts(x: Any) -> Iterator[np.ndarray]:
    """Host arrays whose bytes, one after another, are the array's: where others hold shards of it, layer by layer, so
    that no device ever holds it whole.
    """
    if x.ndim > 2 and spread(x):
        for i in range(len(x)):
            yield from parts(x[i])
    else:
        yield whole(x)


def lost(error: BaseException) -> str | None:
    """One line, where an error says that another process is gone; else None."""
    if not several() or not isinstance(error, jax.errors.JaxRuntimeError | TimeoutError | ConnectionError):
        return None
    if not any(sign in str(error) for sign in SIGNS):
        return None
    return (
        f"another process is gone, so this one ends ({_line(error)}); its own log says why. Start all of them again "
        "with the same command: the run goes on from its last checkpoint"
    )


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")


def end(status: int) -> NoReturn:
    """End at once: at an ordinary exit JAX waits for the others, and they, in the midst of a step, for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
