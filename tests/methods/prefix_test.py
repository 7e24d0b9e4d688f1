import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import injection, tree
from peftax.methods.prefix import prefix
from tests.methods import llama_3b, tiny


def test_by_hand():
    """Every key the same: attention is a mean; three zeros' values of 5 before one token's own v: (3·5 + v) / 4."""
    model, params = tiny.model(), tree.flatten(tiny.params())
    same = {p: jnp.zeros_like(x) if "k_proj" in p else x for p, x in params.items()}
    method = prefix(length=3)
    frozen, trainable = method.init(jax.random.key(0), tree.unflatten(same), tiny.found())
    leaves = trainable["model"]["layers"]["self_attn"]["core_attn"]["prefix"]["default"]
    assert leaves["k"].shape == (2, 3, 2 * 10)
    leaves["k"], leaves["v"] = jnp.zeros_like(leaves["k"]), jnp.full_like(leaves["v"], 5.0)

    seen = {}

    def watch(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.module.name == "core_attn":
            seen["v"], seen["y"] = args[2], out
        return out

    import flax.linen as nn

    unrolled = tiny.model(scan=False)
    whole = tiny.unstack(tree.merge(frozen, trainable))
    with nn.intercept_methods(watch):
        injection.inject(unrolled.apply, method)({"params": whole}, jnp.array([[7]]))
    own = seen["v"][0, :, -1]  # [K, H] of the one token
    expected = jnp.repeat((3 * 5.0 + own) / 4, 2, axis=0)
    np.testing.assert_allclose(seen["y"][0, 0], expected, rtol=1e-5)
    assert model is not unrolled


def test_positions_begin_after_the_prefix():
    """Given or not, they are shifted alike."""
    method = prefix(length=4)
    params = tree.merge(*method.init(jax.random.key(0), tiny.params(), tiny.found()))
    apply = jax.jit(injection.inject(tiny.model().apply, method))
    tokens = jnp.array([[7, 1, 30]])
    np.testing.assert_array_equal(
        apply({"params": params}, tokens), apply({"params": params}, tokens, jnp.array([[0, 1, 2]]))
    )


def test_a_prefix_that_begins_with_a_text_is_that_text():
    """Keys and values of three tokens give the logits that the tokens themselves give before others."""
    model, text, tokens = tiny.model(), (5, 9, 2), jnp.array([[7, 1, 30, 4]])

    def prefill(ids):
        cache = model.init_cache(1, len(ids))
        cache = model.apply({"params": tiny.params()}, jnp.array([ids]), cache=cache, method="hidden")[1]
        return cache["k"][:, 0], cache["v"][:, 0]

    method = prefix(length=3, init="tokens", init_ids=(*text, 11, 12))
    part = method.init(jax.random.key(0), tiny.params(), tiny.found())
    params = tree.merge(*method.begin(part, prefill, tiny.found()))
    ours = injection.inject(model.apply, method)({"params": params}, tokens)
    theirs = model.apply({"params": tiny.params()}, jnp.concatenate([jnp.array([text]), tokens], axis=1))[:, 3:]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_network_behind_the_prefix_by_hand():
    """e W + c = 0.5 at one place, tanh of it times 2, plus 1, is every key; values 3: those of the plain prefix."""
    method, tokens = prefix(length=2, projection=1), jnp.array([[7, 1, 30]])
    flat = tree.flatten(tree.merge(*method.init(jax.random.key(0), tiny.params(), tiny.found())))
    at = "model/layers/self_attn/core_attn/prefix/default"
    flat |= {"prefix/default/e": jnp.ones((2, 20)), "prefix/default/w": jnp.full((20, 1), 0.02)}
    flat |= {"prefix/default/c": jnp.full((1,), 0.1), f"{at}/w_k": jnp.full((2, 1, 20), 2.0)}
    flat |= {f"{at}/c_k": jnp.ones((2, 20)), f"{at}/w_v": jnp.zeros((2, 1, 20)), f"{at}/c_v": jnp.full((2, 20), 3.0)}
    ours = injection.inject(tiny.model().apply, method)({"params": tree.unflatten(flat)}, tokens)
    plain = prefix(length=2)
    flat = tree.flatten(tree.merge(*plain.init(jax.random.key(0), tiny.params(), tiny.found())))
    flat |= {f"{at}/k": jnp.full((2, 2, 20), 2 * np.tanh(0.5) + 1), f"{at}/v": jnp.full((2, 2, 20), 3.0)}
    theirs = injection.inject(tiny.model().apply, plain)({"params": tree.unflatten(flat)}, tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "fields, trainable, total",
    [
        ({"num_virtual_tokens": 200}, 11_468_800, 3_224_218_624),
        ({"num_virtual_tokens": 200, "init_weights": "zero"}, 11_468_800, 3_224_218_624),
        ({"num_virtual_tokens": 50, "init_weights": "zero"}, 2_867_200, 3_215_617_024),
    ],
)
def test_counts_are_those_of_pefts_runs(fields, trainable, total):
    config = {"peft_type": "PREFIX_TUNING", "encoder_hidden_size": 3072, "prefix_projection": False, **fields}
    assert llama_3b.count(config) == {"trainable": trainable, "total": total}


def test_errors():
    with pytest.raises(ValueError, match="has 2 tokens, fewer than length 3: lengthen it"):
        prefix(length=3, init="tokens", init_ids=(1, 2))
    with pytest.raises(ValueError, match="init 'ones' is none of 'normal', 'zeros', 'tokens'"):
        prefix(init="ones")
    with pytest.raises(ValueError, match="a text's keys have no network behind"):
        prefix(length=1, init="tokens", init_ids=(1, 2), projection=4)
    with pytest.raises(ValueError, match="init_text is no ids yet"):
        prefix(init="tokens", init_text="a text").begin(None, None, tiny.found())
