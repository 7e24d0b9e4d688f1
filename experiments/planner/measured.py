"""One cell of `validate`: a step of SmolLM2 is planned, then made, and its memory measured.

  python -m experiments.planner.measured '{"rows": 4, "length": 256, "remat": "dots", "quantize": "none"}'

Measured is the most that the process holds during three steps (VmHWM, set back before) less what it held before the
weights were there, all programs compiled. Operations of XLA's own count are of the unrolled model, whose program it
counts rightly but for the loss, which is one chunk here.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import jax
import numpy as np
from peftax.configs import qlora

from peftax import plan, recipe
from peftax.machines import cost, named
from peftax.train import programs, setup
from peftax.train.step import State


def main() -> None:
    cell = json.loads(sys.argv[1])
    rules = qlora.NF4 if cell["quantize"] == "nf4" else ()
    given = {
        "data.train_length": cell["length"],
        "train.batch_size": cell["rows"],
        "train.chunk": cell["length"],
        "model.remat": cell["remat"],
        "model.quantize": rules,
    }
    config = recipe.load("smollm2_lora", [(k, str(v)) for k, v in given.items()]).to_dict()
    done = plan.plan(config, named("cpu:1"), only=("step",))
    seen = dict(config, model={**config["model"], "scan": False})
    unrolled = programs.every(plan.sketch(seen, named("cpu:1")), seen)["step"]
    traced = unrolled.run.trace(*unrolled.args)
    xla = traced.lower().compile().cost_analysis()["flops"]
    base = setup.outline(**config["model"], mesh=config["mesh"])
    program = programs.training(setup.sketch(base, config["method"]), config)
    run = setup.sketch(base, config["method"])
    batch = programs.batch(cell["rows"], cell["length"], program.lies)
    compiled = program.step.lower(program.state, run.part.frozen, batch).compile()
    give_back()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    base = base.load()
    run = setup.start(base, config["method"], seed=0)
    state = jax.device_put(State.create(run.part.trainable, program.optimizer), program.places)
    frozen = run.part.frozen
    del run
    give_back()
    loaded = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    numbers = {k: np.ones(x.shape, x.dtype) for k, x in batch.items()}
    for _ in range(3):
        state, metrics = compiled(state, frozen, numbers)
        jax.block_until_ready(metrics)
    most = status("VmHWM")
    print(
        json.dumps(
            {
                "planned MiB": round(done.programs["step"].bytes / 2**20),
                "measured MiB": round((most - before) / 2**20),
                "loaded MiB": round((loaded - before) / 2**20),
                "planned GFLOP": round(done.programs["step"].flops / 1e9, 1),
                "unrolled, counted GFLOP": round(cost.flops(traced) / 1e9, 1),
                "unrolled, XLA's GFLOP": round(xla / 1e9, 1),
            }
        )
    )


def status(key: str) -> int:
    """Bytes, of /proc/self/status."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def give_back() -> None:
    """To the system what is free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    main()
