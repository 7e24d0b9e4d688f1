"""Machines that are not here: their devices to compile for, and what a compiled program occupies.

Compiled is not run: these figures are the compiler's, and say nothing of speed.
"""

import importlib.util
import math
from pathlib import Path

import jax
from jax.experimental import topologies

TARGETS = Path(__file__).parent / "targets"

# Without a GPU nothing can be timed, and untimed Triton tiles are arbitrary: give GEMMs to
# cublasLt, with its whole workspace (32 MiB on an H100, 4 MiB on an A100).
CUDA_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


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


def compile(step, *args) -> jax.stages.Compiled:
    """Compile a jitted `step` for the devices that the shardings of its abstract `args` name."""
    devices = {d for a in jax.tree.leaves(args) for d in a.sharding.device_set}
    (platform,) = {d.platform for d in devices}
    platform = {"gpu": "cuda"}.get(platform, platform)
    lowered = step.trace(*args).lower(lowering_platforms=(platform,))
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
