"""Kinds of devices: what one holds, and how fast it is at best. Peaks: no program reaches them.

Sources. TPU: memory, arithmetic and bandwidth as JAX's own table has them (jax/_src/pallas/mosaic/tpu_info.py, 0.10.2);
links, one direction, from Google Cloud's pages of each version (v4 2400, v5e 1600, v6e 3200 Gbps; v5p and TPU7x half of
1200 GB/s both ways); the network from the same pages. GPU: memory and bandwidth from openxla/xla's target
specifications (`targets/`); dense bf16 arithmetic and NVLink, one direction, from NVIDIA's data sheets; the network is
one port of 200 (A100) or 400 Gb/s a GPU, as in DGX systems.
"""

from __future__ import annotations

import dataclasses
import os

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Kind:
    """One device.

    memory:    bytes that a program may use.
    flops:     bf16 operations a second; 0, as the next three: nobody knows.
    bandwidth: bytes a second between its memory and its cores.
    link:      bytes a second that reach it from the others of its host or slice.
    network:   bytes a second that reach it from another host, where these have no links.
    per_host:  devices of one host.
    target:    of a GPU its file in targets/.
    cores:     devices of one chip (TPU).
    """

    platform: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float
    per_host: int
    target: str = ""
    cores: int = 1


KINDS = {
    "v4": Kind("tpu", 34_400_000_000, 2.75e14, 1.23e12, 3.0e11, 6.25e9, 4),
    "v5e": Kind("tpu", 17_200_000_000, 1.97e14, 8.2e11, 2.0e11, 3.1e9, 8),
    "v5p": Kind("tpu", 103_000_000_000, 4.59e14, 2.46e12, 6.0e11, 6.25e9, 4),
    "v6e": Kind("tpu", 34_400_000_000, 9.2e14, 1.64e12, 4.0e11, 1.25e10, 8),
    "tpu7x": Kind("tpu", 103_000_000_000, 1.155e15, 3.7e12, 3.0e11, 6.25e9, 8, cores=2),
    "a100-40gb": Kind("cuda", 42_331_013_120, 3.12e14, 1.555e12, 3.0e11, 2.5e10, 8, "a100_40gb"),
    "a100-80gb": Kind("cuda", 85_100_068_864, 3.12e14, 2.039e12, 3.0e11, 2.5e10, 8, "a100_80gb"),
    "h100": Kind("cuda", 84_942_979_072, 9.89e14, 3.352e12, 4.5e11, 5.0e10, 8, "h100"),
    "h200": Kind("cuda", 151_397_597_184, 9.89e14, 4.8e12, 4.5e11, 5.0e10, 8, "h200"),
    "cpu": Kind("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 0, 0, 0, 0, 1 << 20),  # this one
    "b200": Kind("cuda", 191_514_411_008, 2.25e15, 7.672e12, 9.0e11, 5.0e10, 8, "b200"),
}

# What a cloud calls v5e-16 or v5p-64: chips of v5e and v6e, TensorCores (two a chip) of v4 and v5p.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBE = {
    8: "2x2x1",
    16: "2x2x2",
    32: "2x2x4",
    64: "2x4x4",
    128: "4x4x4",
    256: "4x4x8",
    512: "4x8x8",
    1024: "8x8x8",
    2048: "8x8x16",
}
SLICES = {"v4": CUBE, "v5p": CUBE, "v5e": FLAT, "v6e": FLAT}
