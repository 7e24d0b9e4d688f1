"""What can be said of the backbone without another framework; logits are compared in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax import models
from peftax.models.llama import NO_WINDOW, rope_frequencies

TINY = dict(
    model_type="llama", hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=11
)


def test_unknown_types_and_options_name_what_there_is():
    with pytest.raises(ValueError, match="'gpt2' has no backbone here; there are bert, llama, mistral, qwen2"):
        models.build({**TINY, "model_type": "gpt2"})
    with pytest.raises(ValueError, match="remat 'half' is none of none, dots, full, offload"):
        models.build(TINY, remat="half")
    with pytest.raises(ValueError, match="rope_type 'yarn' is not supported; supported: default, linear, llama3"):
        models.build({**TINY, "rope_scaling": {"rope_type": "yarn"}})


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 40}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"rope_theta": None}, "rope_theta None must be a positive number"),
        ({"rope_scaling": LLAMA3}, "rope_scaling of type 'llama3' wants factor, a number; it has None"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type 'linear' wants factor"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_key_value_heads 3 must divide num_attention_heads 4",
        ),
        ({"head_dim": 5}, r"head_dim 5 .* must be even"),
        (
            {"model_type": "smollm3", "num_key_value_heads": 2, "no_rope_layers": [1]},
            "no_rope_layers has 1 entries and num_hidden_layers is 2",
        ),
        (
            {"model_type": "mistral", "num_key_value_heads": 2, "layer_types": ["sliding_attention"]},
            "layer_types has 1 entries and num_hidden_layers is 2",
        ),
    ],
)
def test_what_does_not_fit_together_names_the_key(given, match):
    with pytest.raises(ValueError, match=match):
        models.build({**TINY, **given})


def test_llama3_rope_by_hand():
    """Head size 4, theta 100: wavelengths 2 pi and 20 pi. With old context 40, low 1, high 4: 2 pi < 10 is kept,
    20 pi > 40 is divided by 8."""
    rope = dict(
        rope_type="llama3",
        rope_theta=100.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=40,
    )
    inv, scale = rope_frequencies({**TINY, "rope_parameters": rope}, 4)
    np.testing.assert_allclose(inv, [1.0, 0.1 / 8], rtol=1e-6)
    assert scale == 1.0


def test_windows_and_layers_without_rope():
    config = models.build({**TINY, "model_type": "mistral", "sliding_window": 3, "num_key_value_heads": 2}).config
    assert config.windows == (3, 3)
    assert models.build(TINY).config.windows == (NO_WINDOW,) * 2
    smol = models.build({**TINY, "model_type": "smollm3", "num_key_value_heads": 2, "no_rope_layers": [1, 0]}).config
    assert smol.rope_layers == (True, False)


@pytest.mark.parametrize("scan", [True, False])
def test_offloaded_inputs_of_layers_give_the_same_gradients(scan):
    """They wait in the host's memory, one array a layer, which on a CPU is a copy."""
    tokens = jnp.arange(14).reshape(2, 7) % 11
    found = {}
    for remat in ("full", "offload"):
        model = models.build(TINY, scan=scan, remat=remat)
        params = model.init(jax.random.key(0), tokens)
        slopes = jax.jit(jax.value_and_grad(lambda p, m=model: jnp.sum(jnp.sin(m.apply(p, tokens)))))
        found[remat] = slopes(params)
        moves = str(jax.make_jaxpr(slopes)(params)).count("device_put")
        assert moves == {"full": 0, "offload": 2 if scan else 4}[remat]  # there and back
    jax.tree.map(np.testing.assert_array_equal, found["full"], found["offload"])
