"""What can be said of the encoder without another framework; its numbers are compared in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax import models

TINY = dict(
    model_type="bert", hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=11
)


def test_what_it_is_not_names_the_nearest():
    for more, match in (
        ({"position_embedding_type": "relative_key"}, "'relative_key', or as a decoder"),
        ({"hidden_act": "swish2"}, "'swish2' is none of silu, gelu"),
    ):
        with pytest.raises(ValueError, match=match):
            models.build({**TINY, **more})
    with pytest.raises(ValueError, match="model.pooling 'max' is none of cls, mean, last"):
        models.build(TINY, labels=2, pooling="max")
    model = models.build(TINY)
    with pytest.raises(ValueError, match="no head: set config.model.labels"):
        model.init(jax.random.key(0), jnp.zeros((1, 2, 8)), method="head")


@pytest.mark.parametrize("remat", ["none", "dots"])
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_a_token_sees_those_behind_it_but_no_other_segment(scan, remat):
    model = models.build(TINY, scan=scan, remat=remat)
    tokens, segments = jnp.array([[1, 2, 3, 4, 5, 6]]), jnp.array([[1, 1, 1, 2, 2, 0]])
    variables = model.init(jax.random.key(0), tokens)
    seen = jax.jit(lambda tokens: model.apply(variables, tokens, None, segments))
    before = seen(tokens)
    for changed, own in ((2, [0, 1, 2]), (3, [3, 4])):
        moved = np.abs(seen(tokens.at[0, changed].set(9)) - before).max(-1)[0] > 1e-6
        assert moved[own].all() and not np.delete(moved, [*own, 5]).any()


def test_a_pooler_stands_only_between_the_first_token_and_a_head():
    def pooler(**options):
        return "pooler" in models.abstract(models.build(TINY, **options))["bert"]

    assert [pooler(), pooler(labels=2), pooler(labels=2, pooling="mean")] == [False, True, False]
