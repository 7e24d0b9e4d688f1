"""peftax: all adapters in one program, which row takes which as data."""

from __future__ import annotations

import jax
import numpy as np

from experiments.mixed_batch import cases
from peftax.core import tree
from peftax.core.method import Ctx
from peftax.mixed_batch import mixed_batch
from peftax.train import setup
from peftax.weights import adapters


def load(told, inputs):
    base = setup.open_base(path=told["base"])
    several = [adapters.load(inputs / f"adapter{i}", base.params, base.sites)[:2] for i in range(cases.ADAPTERS)]
    runs = {}

    def program(method):
        apply = base.inject(method)

        @jax.jit
        def last(params, ids, which):
            ctx = Ctx(adapters=which)
            h, _ = apply({"params": params}, ids, method="hidden", ctx=ctx)
            return apply({"params": params}, h[:, -1:], method="head", ctx=ctx)[:, 0]

        return last

    alone = {}  # adapters of one rank and one choice of targets share a program

    def run(case, ids):
        if case not in runs:
            n = cases.CASES.get(case)
            if n is None:
                method, part = several[int(case) if case.isdigit() else 0]
                kind = str(method.config)
                alone.setdefault(kind, program(method))
                runs[case] = alone[kind], tree.merge(*part)
            else:
                method, part = mixed_batch(several[:n], base.sites)
                runs[case] = program(method), tree.merge(*part)
        last, params = runs[case]
        which = cases.which(case) if case in cases.CASES else np.zeros(len(ids), np.int32)
        return np.asarray(last(params, ids, which))

    return run


if __name__ == "__main__":
    cases.serve(load, first=True)
