"""A population's step compiled for one A100-80GB: members on Llama-3.1-8B in NF4, LoRA on all linear layers."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from peftax import machines, plan, recipe
from peftax.machines import cost
from peftax.train import population, programs


def configs(members: int, rank: int, rows: int, length: int) -> list[dict[str, Any]]:
    """Members that differ in their learning rates."""
    pairs = [
        ("method.rank", str(rank)),
        ("model.remat", "full"),
        ("data.train_length", str(length)),
        ("train.batch_size", str(rows)),
        ("train.accumulate", "1"),
    ]
    one = recipe.load("llama3_8b_qlora", pairs).to_dict()
    return [{**one, "optimizer": {**one["optimizer"], "learning_rate": 1e-4 * (1 + i)}} for i in range(members)]


def measure(members: int, rank: int, rows: int, length: int, name: str = "a100-80gb:1") -> Mapping[str, Any]:
    machine = machines.named(name)
    own = configs(members, rank, rows, length)
    base = plan.sketch(own[0], machine).base
    began = time.perf_counter()
    found = population.sketch(base, own)
    whole = NamedSharding(base.mesh, PartitionSpec())
    lies = lambda shape: whole  # noqa: E731
    batch = programs.batch(rows, length, lies)
    batch = {k: jax.ShapeDtypeStruct((members, *x.shape), x.dtype, sharding=whole) for k, x in batch.items()}
    numbers = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in (found.rates, found.seeds)]
    args = (*numbers, found.state, found.theta, batch, found.base)
    traced = found.step.trace(*args)
    flops = cost.flops(traced)
    compiled = machines.compile(found.step, *args, traced=traced)
    parts, moved = machines.memory(compiled), cost.traffic(compiled)
    packed = cost.traffic(compiled, kinds=("u8",)).memory
    return dict(members=members, rank=rank, rows=rows, length=length, gib=parts["bytes"] / 2**30, packed=packed, flops=flops,
                traffic=moved.memory, seconds=time.perf_counter() - began,
                compute=flops / machine.kind.flops, memory=moved.memory / machine.kind.bandwidth)

if __name__ == "__main__":
    for case in sys.argv[1:]:
        print(measure(*map(int, case.split(","))), flush=True)
