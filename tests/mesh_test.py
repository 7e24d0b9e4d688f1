"""Training on eight devices, however they share the work: the numbers of one device, and what the programs may hold.

Meshes of data x fsdp x tensor x sequence; packed rows with several segments; a dense base, and one in four bits.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from peftax import models, sharding
from peftax.core import injection, quantization, sites, tree
from peftax.train import loss
from peftax.train.step import State, make_step, state_shardings
from tests.methods import tiny

CONFIG = {**tiny.CONFIG, "hidden_size": 96, "intermediate_size": 192, "head_dim": 24}
MODEL = models.build(CONFIG, remat="dots")
SHAPES = models.abstract(MODEL)
SITES = sites.find(MODEL.apply, SHAPES, jax.ShapeDtypeStruct((1, 3), jnp.int32))
STEPS = 20
RULES = {"dense": (), "nf4": (("_proj/kernel$", {"fmt": "nf4", "group": 32, "double": True}),)}
METHODS = {"lora": {"rank": 4}, "dora": {"rank": 4}, "adapter": {"size": 6}, "prompt": {"length": 4}}
MESHES = {
    "8x1x1": {"data": 8, "fsdp": 1},
    "2x4x1": {"data": 2, "fsdp": 4},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
    "2x2x1 s2": {"data": 2, "fsdp": 2, "sequence": 2},
    "1x2x2 s2": {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2},
}
# what the quick tier trains: every mesh, every method, both bases; the rest of the product is slow
QUICK = {("lora", "nf4", mesh) for mesh in MESHES} | {
    ("dora", "nf4", "1x2x2 s2"),
    ("adapter", "dense", "2x2x2"),
    ("prompt", "dense", "1x2x2 s2"),
}
PRODUCT = [(method, base, mesh) for method in METHODS for base in RULES for mesh in MESHES]


@functools.cache
def base(kind):
    rng = np.random.default_rng(0)

    def draw(path, x):
        size = {"kernel": 1 / np.sqrt(x.shape[-2:][0]), "embedding": 1.0}.get(path.rsplit("/", 1)[1], 0.1)
        return jnp.asarray(rng.normal(float(path.endswith("scale")), size, x.shape), jnp.float32)

    flat = {path: draw(path, x) for path, x in tree.flatten(SHAPES).items()}
    return quantization.quantize(tree.unflatten(flat), RULES[kind], SITES)


class Trained:
    """A step compiled once, and what twenty of them give with either optimizer."""

    def __init__(self, name, kind, mesh):
        method, optimizer = tiny.method(name, **METHODS[name]), tiny.either()
        init = jax.jit(lambda key, p: method.init(key, p, SITES))
        part = init(jax.random.key(0), base(kind))
        self.frozen, trainable, on_mesh, places = part.frozen, tiny.perturb(part.trainable, zero=0.05), {}, None
        batch = tiny.packed()
        assert max(row.max() for row in batch["segment_ids"]) > 1
        if mesh:
            grid = sharding.make_mesh(**MESHES[mesh])
            specs = sharding.base_specs(SHAPES, SITES, grid)
            lie = functools.partial(sharding.shardings, method=method, sites=SITES, base=specs, mesh=grid)
            self.frozen = jax.device_put(self.frozen, lie(self.frozen))
            on_mesh = {"rows": NamedSharding(grid, sharding.BATCH), "specs": specs}
            batch = {k: jax.device_put(x, sharding.of_batch(x.shape, grid)) for k, x in batch.items()}
            shapes, whole = State.create(trainable, optimizer), NamedSharding(grid, PartitionSpec())
            places = state_shardings(shapes, lie(trainable), optimizer, whole)
        apply = injection.inject(MODEL.apply, method, **on_mesh)
        step = make_step(apply, functools.partial(loss.causal_lm, chunk=8), optimizer, shardings=places)

        def state(adam):
            made = tiny.begin(trainable, optimizer, adam=adam, rate=1e-3 if adam else 0.01)
            return made if places is None else jax.device_put(made, places)

        self.compiled = step.lower(state(False), self.frozen, batch).compile()
        self.losses = {}
        for adam in (False, True):
            now, losses = state(adam), []
            for _ in range(STEPS):
                now, metrics = self.compiled(now, self.frozen, batch)
                losses.append(float(metrics["loss"]))
                if len(losses) == 1:
                    self.gradient = jax.tree.map(np.array, now.opt_state["gradient"])
            self.losses[adam] = losses


@functools.cache
def trained(name, kind, mesh=None):
    return Trained(name, kind, mesh)


@pytest.fixture(
    params=[p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in PRODUCT], ids=" ".join, scope="module"
)
def pair(request):
    """(the case, on one device, on the mesh)"""
    name, kind, mesh = request.param
    return request.param, trained(name, kind), trained(name, kind, mesh)


def test_trains_as_on_one_device(pair):
    """First gradients to 1e-5 of each leaf's largest; losses over 20 steps to 1e-5 with SGD, 1e-4 with Adam."""
    _, one, many = pair
    tiny.close(one.gradient, many.gradient, 1e-5)
    for adam, tolerance in ((False, 1e-5), (True, 1e-4)):
        assert one.losses[adam][-1] < one.losses[adam][0]
        np.testing.assert_allclose(many.losses[adam], one.losses[adam], rtol=tolerance)


# what may stand for a stack without being a new array of its size
SAME = {"parameter", "get-tuple-element", "bitcast", "tuple", "while", "copy-done", "opt-barrier"}
COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(-start)?\(")


def test_what_the_program_may_hold(pair):
    """No array of a whole stack of weights but the arguments, whole or in parts; of numbers in few bits none at all,
    and none that moves.
    """
    (_, kind, _), _, many = pair
    text = many.compiled.as_text()
    stacks = {s.kernel for s in SITES.values() if s.stack}
    for path, x in tree.flatten(many.frozen).items():
        if path not in stacks:
            continue
        layers, k, n = x.shape
        lies = (x.packed if tree.is_packed(x) else x).sharding
        of_k, of_n = (math.prod(lies.mesh.shape[a] for a in jax.tree.leaves(axes)) for axes in lies.spec[1:])
        parts = {(k // a, n // b) for a in (1, of_k) for b in (1, of_n)}
        forms = {form for k, n in parts for form in ((k, n), (k // 2, 2, n), (max(1, k // 32), 32, n), (n, k))}
        for line in text.splitlines():
            if not (found := re.match(r"\s*(?:ROOT )?%\S+ = \(?(f32|bf16)\[([\d,]*)\]\S* .*?([\w-]+)\(", line)):
                continue
            sizes = tuple(int(n) for n in found[2].split(",") if n)
            whole = sizes[0:1] == (layers,) and sizes[1:] in forms
            assert not whole or (kind == "dense" and found[3] in SAME), line.strip()[:200]
            if kind == "nf4" and COLLECTIVE.search(line):
                assert tuple(n for n in sizes if n > 1) not in forms, line.strip()[:200]
