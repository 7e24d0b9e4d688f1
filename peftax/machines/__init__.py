"""Machines that are not here: their devices to compile for, and what a compiled program occupies.

Compiled is not run: these figures are the compiler's, and say nothing of speed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from pathlib import Path

import jax
from jax.experimental import topologies

from peftax.machines.kinds import FLAT, KINDS, SLICES, Kind

TARGETS = Path(__file__).parent / "targets"

# Without a GPU nothing can be timed, and untimed Triton tiles are arbitrary: give GEMMs to
# cublasLt, with its whole workspace (32 MiB on an H100, 4 MiB on an A100).
CUDA_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices of one kind that work together; `devices()` is what programs are compiled for."""

    name: str
    kind: Kind
    count: int
    topology: str = ""  # of a TPU slice

    @property
    def hosts(self) -> int:
        return -(-self.count // self.kind.per_host)

    def devices(self) -> list[jax.Device]:
        """Raises ValueError that says what to install where its compiler is missing."""
        if self.kind.platform == "cpu":
            if len(found := jax.devices("cpu")) < self.count:
                raise ValueError(f"{self.name}: there are {len(found)}; set JAX_NUM_CPU_DEVICES={self.count}")
            return found[: self.count]
        if why := missing(self.kind.platform):
            raise ValueError(f"{self.name}: {why}")
        if self.kind.platform == "tpu":
            return tpu(self.topology)
        return gpu(self.kind.target, self.count)


def named(name: str) -> Machine:
    """The machine of a name: "a100-80gb:1" and "h100:16" (GPUs, eight a host), "v5e-16" (a TPU slice as clouds name
    it), "v5p:2x2x4" (its topology), "cpu:1" (this one, its devices sharing the memory).
    """
    kind, mark, size = name.partition(":")
    if not mark and (whole := name.rpartition("-"))[0] in SLICES:
        kind, _, size = whole
        mark = "-"
    known = f"known: {', '.join(KINDS)}, as in a100-80gb:8, v5e-16 or v5p:2x2x4"
    if kind not in KINDS:
        raise ValueError(f"no machine {name!r}; {known}")
    figures = KINDS[kind]
    if figures.platform == "tpu":
        sizes = SLICES.get(kind, {})
        shape = sizes.get(int(size), "") if mark == "-" and size.isdigit() else size
        sides = shape.split("x")
        if len(sides) != (2 if SLICES.get(kind) is FLAT else 3) or not all(s.isdigit() for s in sides):
            flat = SLICES.get(kind) is FLAT
            likes = f"{kind}-N with N of {', '.join(map(str, sizes))}; or " if sizes else ""
            raise ValueError(f"no machine {name!r}: want {likes}{kind}:{'4x4' if flat else '2x2x1'}, its topology")
        chips = math.prod(map(int, sides))
        return Machine(name, figures, chips * figures.cores, f"{kind}:{shape}")
    if figures.platform == "cpu" and size.isdigit() and int(size):
        return Machine(name, dataclasses.replace(figures, memory=figures.memory // int(size)), int(size))
    if not size.isdigit() or not int(size) or (int(size) > 8 and int(size) % 8):
        raise ValueError(f"no machine {name!r}: want {kind}:N, N of 1 to 8 or a multiple of 8")
    return Machine(name, figures, int(size))


def missing(platform: str) -> str | None:
    """Why programs for `platform` ("tpu" or "cuda") cannot be compiled here; None if they can."""
    wheel, module = {
        "tpu": ("libtpu", "libtpu"),
        "cuda": ("jax-cuda12-plugin", "jax_plugins.xla_cuda12"),
    }[platform]
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the parent package is missing too
        found = None
    return None if found else f"{wheel} is not installed: pip install peftax[aot]"


def tpu(name: str = "v5e:2x2") -> list[jax.Device]:
    """The chips of a TPU slice, `name` being "<generation>:<shape>", such as v5p:2x2x1."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    shape = name.partition(":")[2]
    options = {}
    if set(shape.split("x")) == {"1"}:  # one chip of a host that has more
        options["chips_per_host_bounds"] = (1, 1, 1)
    return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)


def gpu(name: str = "h100", count: int = 1) -> list[jax.Device]:
    """`count` GPUs of the kind in `targets/<name>.txtpb`, eight to a host."""
    path = TARGETS / f"{name}.txtpb"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in TARGETS.glob("*.txtpb")))
        raise ValueError(f"no GPU named {name!r} in {TARGETS}; known: {known}")
    per_host = min(count, 8)
    if count < 1 or count % per_host:
        raise ValueError(f"gpu(count={count}): give 1 to 8, or a multiple of 8")
    topology = f"1x{count // per_host}x{per_host}"  # slices x hosts x GPUs of one host
    description = topologies.get_topology_desc(name, platform="cuda", topology=topology, target_config=path.read_text())
    return list(description.devices)


def compile(step, *args, traced=None) -> jax.stages.Compiled:
    """Compile a jitted `step` for the devices that the shardings of its abstract `args` name; it may be `traced`."""
    devices = {d for a in jax.tree.leaves(args) for d in a.sharding.device_set}
    (platform,) = {d.platform for d in devices}
    platform = {"gpu": "cuda"}.get(platform, platform)
    lowered = (traced or step.trace(*args)).lower(lowering_platforms=(platform,))
    return lowered.compile(CUDA_OPTIONS if platform == "cuda" else None)


def shard_bytes(tree) -> int:
    """Bytes that one device holds of an abstract tree with shardings, before any padding."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of a compiled program on one device; "bytes" is what must fit.

    Neither of two figures bounds the other: the sum of the parts holds the gaps between buffers,
    the compiler's peak holds, on a TPU, buffers that are not among the temporaries (it keeps them
    in VMEM). Take the larger. Of libraries' workspaces only cublasLt's are counted.
    """
    m = compiled.memory_analysis()
    parts = {
        "arguments": m.argument_size_in_bytes,
        "outputs": m.output_size_in_bytes,
        "aliases": m.alias_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "peak": m.peak_memory_in_bytes,
    }
    total = parts["arguments"] + parts["outputs"] - parts["aliases"] + parts["temporaries"]
    return {"bytes": max(total, parts["peak"]), **parts}
