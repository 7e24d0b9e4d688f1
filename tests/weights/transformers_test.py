"""What `save` writes transformers opens: no weight left over, none made up, equal logits."""

import jax
import numpy as np
import pytest

from peftax import models, weights

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="the parity extra is not installed")

LLAMA = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    "change",
    [{}, {"tie_word_embeddings": False}, {"model_type": "qwen2"}, {"model_type": "qwen3"}],
    ids=["tied", "free", "qwen2", "qwen3"],
)
@pytest.mark.parametrize("scan, limit", [(True, 5_000), (False, 5_000_000)])
def test_transformers_opens_it(tmp_path, change, scan, limit):
    from transformers import AutoModelForCausalLM

    config = LLAMA | change
    model = models.build(config, scan=scan)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), models.abstract(model))
    folder = weights.save(params, config, tmp_path / "m", max_shard_bytes=limit)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32
    assert theirs.generation_config.eos_token_id == 2

    tokens = rng.integers(0, config["vocab_size"], (2, 7))
    ours = np.asarray(model.apply({"params": params}, tokens.astype(np.int32)))
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
