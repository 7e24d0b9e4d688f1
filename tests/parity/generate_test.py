import numpy as np
import pytest

from peftax import models, weights
from peftax.train.generate import Generator

torch = pytest.importorskip("torch", reason="parity needs torch: make parity")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.3,  # large enough that answers vary
)
KINDS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral, window": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, sliding_window=7, head_dim=8)
    ),
}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_transformers_token_for_token(kind, scan, tmp_path):
    torch.manual_seed(0)
    theirs = KINDS[kind]().eval()
    theirs.save_pretrained(tmp_path)
    source = weights.open(tmp_path)
    model = models.build(source.config, scan=scan)
    params = weights.load(source, models.abstract(model))

    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 97, n).tolist() for n in (5, 17, 1, 9, 12, 30, 3)]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = theirs.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)[
            :, width:
        ].tolist()
    want = [row[: row.index(2)] if 2 in row else row for row in out]

    generate = Generator(model.apply, model.init_cache, max_new_tokens=24, eos_ids=(2,), batch_size=4, bucket=8)
    assert generate(params, prompts) == want
    assert len({tuple(w) for w in want}) > 4  # the answers differ
    assert generate(params, [p[1:] for p in prompts if len(p) > 1], prefix=[5]) == generate(
        params, [[5, *p[1:]] for p in prompts if len(p) > 1]
    )
