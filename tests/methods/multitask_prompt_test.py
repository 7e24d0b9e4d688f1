import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import injection, tree
from peftax.core.method import Ctx
from peftax.data import packing
from peftax.methods.multitask_prompt import multitask_prompt
from peftax.train import loss
from tests.methods import llama_3b, tiny

SMALL = {"tasks": 3, "rank": 2}
AT = "model/embed_tokens/multitask_prompt/default"
TOKENS = jnp.array([[7, 1, 30, 4], [3, 3, 8, 20]])


@pytest.fixture(scope="module")
def made():
    """(method of 3 tasks and 2 rows, parameters, compiled apply)."""
    method = multitask_prompt(length=2, tasks=3)
    part = method.init(jax.random.key(0), tiny.params(), tiny.found())
    params = tree.merge(part.frozen, tiny.perturb(part.trainable))
    return method, params, jax.jit(injection.inject(tiny.model().apply, method))


def test_by_hand(made):
    """P = [[1, 2, 3 ...], [1, 1, 1 ...]], C = [2, 10], R = [1, 0.5, 0 ...]:
    [[2·1·1, 2·0.5·2, 0 ...], [10·1·1, 10·0.5·1, 0 ...]].

    The base's own table, with these rows in the place of tokens 35 and 36, says what the logits are.
    """
    _, params, apply = made
    flat = tree.flatten(params)
    flat[f"{AT}/p"] = jnp.ones((2, 24)).at[0, :3].set(jnp.array([1.0, 2.0, 3.0]))
    flat[f"{AT}/cols"] = flat[f"{AT}/cols"].at[1].set(jnp.array([[2.0], [10.0]]))
    flat[f"{AT}/rows"] = flat[f"{AT}/rows"].at[1].set(jnp.zeros((1, 24)).at[0, :2].set(jnp.array([1.0, 0.5])))
    ours = apply({"params": tree.unflatten(flat)}, TOKENS, ctx=Ctx(tasks=jnp.array([1, 1])))
    table = tiny.params()["model"]["embed_tokens"]["embedding"].at[35:].set(0.0)
    table = table.at[35, :2].set(jnp.array([2.0, 2.0])).at[36, :2].set(jnp.array([10.0, 5.0]))
    base = tree.unflatten({**tree.flatten(tiny.params()), "model/embed_tokens/embedding": table})
    spelled = jnp.concatenate([jnp.array([[35, 36], [35, 36]]), TOKENS], axis=1)
    np.testing.assert_allclose(ours, tiny.model().apply({"params": base}, spelled)[:, 2:], atol=1e-5)


def test_each_row_has_its_own_task(made):
    method, params, apply = made
    mixed = apply({"params": params}, TOKENS, ctx=Ctx(tasks=jnp.array([2, 0])))
    for row, task in enumerate((2, 0)):
        alone = apply({"params": params}, TOKENS, ctx=Ctx(tasks=jnp.array([task, task])))
        np.testing.assert_allclose(mixed[row], alone[row], atol=1e-5)
    assert tiny.distance(mixed[1], alone[0]) > 1e-2
    none = apply({"params": params}, TOKENS)
    np.testing.assert_allclose(none, alone, atol=1e-5)  # task 0 is the method's own setting
    other = injection.inject(tiny.model().apply, multitask_prompt(length=2, tasks=3, task=2))
    np.testing.assert_allclose(jax.jit(other)({"params": params}, TOKENS)[0], mixed[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"multitask_prompt: tasks \(3,\) of 2 rows; want one a row, \(2,\)"):
        apply({"params": params}, TOKENS, ctx=Ctx(tasks=jnp.array([0, 1, 2])))
    assert np.isnan(apply({"params": params}, TOKENS, ctx=Ctx(tasks=jnp.array([3, 0])))[0]).all()


def test_a_batch_holds_the_tasks_and_only_theirs_train(made):
    """Packed rows hold one task each; the third task gets no gradient."""
    method, params, apply = made
    paths = [f"{AT}/{leaf}" for leaf in ("cols", "rows")]
    flat, rows = tree.flatten(params), tiny.batch()
    which = jnp.array([[0], [1]] * 4, jnp.int32)

    @jax.jit
    @jax.value_and_grad
    def total(leaves, batch):
        return loss.causal_lm(
            injection.inject(tiny.model().apply, method), tree.unflatten({**flat, **leaves}), batch, chunk=8
        )[0]

    value, gradient = total({p: flat[p] for p in paths}, {**rows, "tasks": which})
    assert abs(value - total({p: flat[p] for p in paths}, {**rows, "tasks": 0 * which})[0]) > 1e-3
    for path in paths:
        each = np.abs(gradient[path]).reshape(3, -1).max(1)
        assert each[0] > 0 and each[1] > 0 and each[2] == 0


def test_packed_rows_of_tasks_are_the_unpacked_ones(made):
    method, params, _ = made
    examples = [dataclasses.replace(e, task=i % 2) for i, e in enumerate(tiny.examples())]
    rows = packing.pack(examples, tiny.LENGTH)
    assert len(rows["tokens"]) < 8 and rows["segment_ids"].max() > 1
    rows = {k: np.pad(v, ((0, 8 - len(v)), (0, 0))) for k, v in rows.items()}
    value = jax.jit(lambda batch: loss.causal_lm(injection.inject(tiny.model().apply, method), params, batch, chunk=8))
    packed, padded = (value(batch)[0] for batch in (rows, packing.pad(examples, tiny.LENGTH)))
    assert abs(packed - padded) <= 1e-5 * padded


def test_counts():
    """200 (rows) x 3072, and 4 tasks of rank 2."""
    config = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 200, "num_tasks": 4, "num_ranks": 2}
    assert llama_3b.count(config)["trainable"] == 200 * 3072 + 4 * 2 * (200 + 3072)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="multitask_prompt: task 2 is none of 0 to 1"):
        multitask_prompt(tasks=2, task=2)
    with pytest.raises(ValueError, match="multitask_prompt: rank 0 must be at least 1"):
        multitask_prompt(rank=0)
