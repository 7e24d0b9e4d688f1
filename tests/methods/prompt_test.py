import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import injection, sites, tree
from peftax.methods.prompt import prompt
from tests.methods import llama_3b, tiny


def start(method, scan=True):
    return method.init(jax.random.key(0), tiny.params(scan), tiny.found(scan))


def test_rows_of_the_table_are_the_tokens_themselves():
    """A prompt that is the embedding of three tokens gives the logits that those tokens give."""
    ids, tokens = (5, 9, 2), jnp.array([[7, 1, 30, 4], [3, 3, 8, 20]])
    method = prompt(length=3, init="tokens", init_ids=ids)
    model, params = tiny.model(), tree.merge(*start(method))
    ours = injection.inject(model.apply, method)({"params": params}, tokens)
    spelled = jnp.concatenate([jnp.broadcast_to(jnp.array(ids)[None], (2, 3)), tokens], axis=1)
    theirs = model.apply({"params": tiny.params()}, spelled)[:, 3:]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_starts():
    table = np.asarray(tiny.params()["model"]["embed_tokens"]["embedding"])

    def rows(**settings):
        return np.asarray(start(prompt(**settings)).trainable["model"]["embed_tokens"]["prompt"]["default"]["p"])

    np.testing.assert_array_equal(rows(length=5, init="tokens", init_ids=(4, 6)), table[[4, 6, 4, 6, 4]])
    drawn = rows(length=6, init="vocabulary")
    assert all((row == table).all(-1).any() for row in drawn) and len({row.tobytes() for row in drawn}) == 6
    assert rows(length=50).std() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB"])
def test_counts_are_those_of_pefts_runs(init):
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 200, "prompt_tuning_init": init}
    assert llama_3b.count(config) == {"trainable": 614_400, "total": 3_213_364_224}


def test_errors():
    with pytest.raises(ValueError, match="belong together"):
        prompt(init="tokens")
    with pytest.raises(ValueError, match="init_text is no ids yet"):
        start(prompt(init="tokens", init_text="a text"))
    method = prompt(length=2)
    apply, params = injection.inject(tiny.model().apply, method), tree.merge(*start(method))
    with pytest.raises(ValueError, match="token ids"):
        apply({"params": params}, jnp.zeros((1, 3, 24)), method="hidden")
    with pytest.raises(ValueError, match="'inputs' by name alone; give the token ids as its first argument"):
        apply({"params": params}, inputs=jnp.zeros((1, 3), jnp.int32))
    assert method.fold is None and method.front == 2


class Positioned(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        return nn.Embed(11, 6, name="tokens")(tokens) + nn.Embed(30, 6, name="places")(places)


def test_one_table_of_several():
    model, tokens = Positioned(), jnp.array([[1, 2, 3]])
    params = model.init(jax.random.key(0), tokens)["params"]
    found = sites.find(model.apply, params, tokens)
    with pytest.raises(ValueError, match="several tables: .*tokens.*`table`"):
        prompt(length=2).init(jax.random.key(0), params, found)
    method = prompt(length=2, table="tokens")
    part = method.init(jax.random.key(0), params, found)
    assert list(tree.flatten(part.trainable)) == ["tokens/prompt/default/p"]
    y = injection.inject(model.apply, method)({"params": tree.merge(*part)}, tokens)
    after = params["places"]["embedding"][2:5] + params["tokens"]["embedding"][jnp.array([1, 2, 3])]
    np.testing.assert_allclose(y[0], after, atol=1e-6)
    for same in (None, Positioned.__call__):  # as linen takes it
        again = injection.inject(model.apply, method)({"params": tree.merge(*part)}, tokens, method=same)
        np.testing.assert_array_equal(again, y)
