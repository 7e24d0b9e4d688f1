import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import injection, tree
from peftax.methods.prefix import prefix
from tests.methods import tiny


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
