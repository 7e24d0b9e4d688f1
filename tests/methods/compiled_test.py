"""Laws on the compiled step, read from its text: they catch what numbers do not.

For every method that leaves kernels frozen: no array of a whole stack is made, kernels are read at most three times
a step, and what a step gives back takes the place of what it was given.
"""

import collections
import functools
import re

import jax
import optax
import pytest
from jax.extend import core

from peftax import methods
from peftax.core import injection, tree
from peftax.core.method import parts
from peftax.train import loss
from peftax.train.step import State, make_step
from tests.methods import tiny

NAMES = [n for n in methods.names() if any(m.call for m in parts(tiny.method(n)))]
# what may stand for a stack without being a new array of its size
SAME = {"parameter", "get-tuple-element", "bitcast", "tuple", "while", "copy-done", "opt-barrier"}


class Step:
    def __init__(self, name: str, remat: str):
        self.method = tiny.method(name, **({"dropout": 0.1} if "dropout" in methods.defaults(name) else {}))
        part = jax.eval_shape(lambda p: self.method.init(jax.random.key(0), p, tiny.found()), tiny.params())
        optimizer = optax.adam(1e-3)
        apply = injection.inject(tiny.model(remat=remat).apply, self.method)
        step = make_step(apply, functools.partial(loss.causal_lm, chunk=8), optimizer, dropout_seed=0)
        state = jax.eval_shape(lambda t: State.create(t, optimizer), part.trainable)
        self.frozen = tree.flatten(part.frozen)
        self.state = state
        traced = step.trace(state, part.frozen, tiny.batch())
        self.jaxpr = traced.jaxpr
        self.compiled = traced.lower().compile()

    def stacks(self):
        return {s.kernel: self.frozen[s.kernel].shape for s in tiny.found().values() if s.stack}


@pytest.fixture(scope="module", params=NAMES)
def step(request):
    return Step(request.param, "none")


def test_no_array_of_a_whole_stack_is_made(step):
    shapes = {f"f32[{','.join(map(str, shape))}]" for shape in step.stacks().values()}
    made = collections.defaultdict(list)
    for line in step.compiled.as_text().splitlines():
        found = re.match(r"\s*(?:ROOT )?%\S+ = (f32\[[\d,]+\])\S* ([\w-]+)\(", line)
        if found and found[1] in shapes and found[2] not in SAME:
            made[found[1]].append(line.strip()[:120])
    assert not made, dict(made)


def test_kernels_are_read_at_most_three_times(step):
    """Products with an operand of a kernel's shape, in the step's own program: forward, backward, one more.

    A method that needs the dense kernel makes a temporary, whose slopes are of that shape too; so does one of many
    frequencies.
    """
    most = 6 if step.method.needs == "dense" or step.method.name == "fourierft" else 3
    sizes = collections.Counter(tuple(sorted(shape[1:])) for shape in step.stacks().values())
    reads = collections.Counter()
    for shapes in _products(step.jaxpr.jaxpr):
        for size in sizes:
            reads[size] += any(tuple(sorted(shape)) == size for shape in shapes)
    for size, kernels in sizes.items():
        assert 2 * kernels <= reads[size] <= most * kernels, (size, kernels, reads[size])


def test_state_is_given_back_in_place(step):
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(step.state))
    assert step.compiled.memory_analysis().alias_size_in_bytes >= held


def _products(jaxpr):
    """The operands' shapes of every product, also inside loops and calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield [v.aval.shape for v in equation.invars]
        for inner in core.jaxprs_in_params(equation.params):
            yield from _products(inner)
