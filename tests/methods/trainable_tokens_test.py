import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax import methods, models
from peftax.core import injection, sites, tree
from peftax.methods import trainable_tokens as file
from peftax.methods.lora import lora
from peftax.methods.trainable_tokens import trainable_tokens
from tests.core import toys
from tests.methods import llama_3b, tiny

SMALL = {"tokens": tuple(range(3, 36)), "targets": ("embed_tokens", "lm_head")}
TOY = {"tokens": (2, 0, 1)}


class Tied(nn.Module):
    def setup(self):
        self.table, self.head = nn.Embed(4, 2), toys.Head()

    def __call__(self, ids):
        return self.head(self.table(ids), self.table)


E = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
IDS = jnp.array([[3, 0, 1]])


def outcome(method):
    """(logits, folded) of the tied model where token 3's row is [0, 5] and token 1's [1, 0]."""
    params = {"table": {"embedding": E}}
    found = sites.find(Tied().apply, params, IDS)
    frozen, trainable = method.init(jax.random.key(0), params, found)
    ((path, start),) = [(p, x) for p, x in tree.flatten(trainable).items() if p.endswith("/rows")]
    assert start.tolist() == [[2.0, 0.0], [0.0, 1.0]]
    flat = {**tree.flatten(trainable), path: jnp.array([[0.0, 5.0], [1.0, 0.0]])}
    merged = tree.merge(frozen, tree.unflatten(flat))
    return injection.inject(Tied().apply, method)({"params": merged}, IDS), method.fold(merged, found)


def test_by_hand():
    """E' = [1, 0], [1, 0], [1, 1], [0, 5]: the rows of tokens 3, 0, 1 times its transpose."""
    logits, folded = outcome(trainable_tokens(tokens=(3, 1), targets=["table"]))
    assert logits.tolist() == [[[0.0, 0.0, 5.0, 25.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]]
    assert folded == {"table": {"embedding": folded["table"]["embedding"]}}  # the tie stays
    assert folded["table"]["embedding"].tolist() == [[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 5.0]]


@pytest.mark.parametrize("tokens", [(3, 1), {"table": (3, 1)}, (("table", [3, 1]), ("head", [3, 1]))])
def test_beside_lora(tokens):
    """Another part, with the same outcome: B is zero."""

    class Model(Tied):
        def setup(self):
            super().setup()
            self.dense = nn.Dense(2, use_bias=False)

        def __call__(self, ids):
            return self.head(self.dense(self.table(ids)), self.table)

    params = {"table": {"embedding": E}, "dense": {"kernel": jnp.eye(2)}}
    method = lora(rank=1, targets=["dense"], tokens=tokens)
    found = sites.find(Model().apply, params, IDS)
    frozen, trainable = method.init(jax.random.key(0), params, found)
    assert set(tree.flatten(trainable)) == {"dense/lora/default/a", "dense/lora/default/b", "table/tokens/default/rows"}
    trainable["table"]["tokens"]["default"]["rows"] = jnp.array([[0.0, 5.0], [1.0, 0.0]])
    merged = tree.merge(frozen, trainable)
    logits = injection.inject(Model().apply, method)({"params": merged}, IDS)
    assert logits.tolist() == [[[0.0, 0.0, 5.0, 25.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]]
    folded = Model().apply({"params": method.fold(merged, found)}, IDS)
    np.testing.assert_array_equal(folded, logits)


def test_a_head_of_its_own_has_columns():
    part = lora(rank=1, targets=["q_proj"], tokens={"embed_tokens": [1, 5], "lm_head": [7]})
    _, trainable = part.init(jax.random.key(0), tiny.params(), tiny.found())
    rows = trainable["model"]["embed_tokens"]["tokens"]["default"]["rows"]
    columns = trainable["lm_head"]["tokens"]["default"]["columns"]
    np.testing.assert_array_equal(rows, tiny.params()["model"]["embed_tokens"]["embedding"][jnp.array([1, 5])])
    np.testing.assert_array_equal(columns, tiny.params()["lm_head"]["kernel"][:, 7:8])


def test_nothing_of_the_tables_size_is_made():
    """The step's own program: forward and backward, of a tied model."""
    model = models.build({**tiny.CONFIG, "tie_word_embeddings": True})
    shapes = models.abstract(model)
    found = sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 3), jnp.int32))
    method = trainable_tokens(tokens=(3, 1))
    part = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, found), shapes)
    apply = injection.inject(model.apply, method)

    def total(trainable, frozen):
        return apply({"params": tree.merge(frozen, trainable)}, jnp.zeros((2, 5), jnp.int32)).sum()

    program = str(jax.make_jaxpr(jax.grad(total))(*reversed(part)))
    made = [line for line in program.splitlines() if ":f32[37,24] = " in line and "transpose" not in line]
    assert not made


def test_counts_are_those_of_pefts_run():
    config = {
        "peft_type": "TRAINABLE_TOKENS",
        "token_indices": [128000, 128001],
        "target_modules": "model.embed_tokens",
    }
    assert llama_3b.count(config) == {"trainable": 6144, "total": 3_212_755_968}


@pytest.mark.parametrize("tokens", [(), (3, 5), {"embed_tokens": (3, 5), "lm_head": (1,)}])
@pytest.mark.parametrize("name", ["lora", "dora", "adalora"])
def test_config_there_and_back(name, tokens):
    beside = methods.module(name).HF
    written = beside.write(methods.make(name, targets=["q_proj"], tokens=tokens).config)
    again = methods.make(name, **beside.read({"peft_type": beside.peft_type, **written}))
    assert beside.write(again.config) == written
    assert len(again.parts) == (3 if tokens else 2)
    own = file.HF.write(trainable_tokens(tokens=(3, 5)).config)
    assert trainable_tokens(**file.HF.read(own)).config == trainable_tokens(tokens=(3, 5)).config


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: trainable_tokens(), "trainable_tokens: tokens is empty"),
        (lambda: trainable_tokens(tokens=(3, 37)), "token 37 is no row of the table, which has 37"),
        (lambda: trainable_tokens(tokens=(-1,)), "token -1 is no row"),
        (lambda: trainable_tokens(tokens=(3, 3)), "token 3 .* stands twice"),
        (lambda: lora(tokens=("<tool>",)), "tokens: token '<tool>'.*new_tokens"),
        (lambda: lora(tokens={"embed_tokns": [1]}), "tokens: targets match no module"),
        (lambda: lora(tokens=[1], modules_to_save=["embed_tokens"]), "'model.embed_tokens' is in modules_to_save"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make().init(jax.random.key(0), tiny.params(), tiny.found())


def test_unlike_tokens_of_a_tie():
    params = {"table": {"embedding": E}}
    found = sites.find(Tied().apply, params, IDS)
    part = lora(targets=["table"], tokens={"table": [1], "head": [2]}).parts[1]
    with pytest.raises(ValueError, match="'head' is tied to its table"):
        part.init(jax.random.key(0), params, found)
