"""BERT against transformers' on random tiny models and on MiniLM's real weights."""

import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: run with .venv-parity")

import transformers  # noqa: E402

from peftax import models, weights  # noqa: E402
from peftax.data import asset, movie_reviews, packing  # noqa: E402
from peftax.data.chat import Example  # noqa: E402
from peftax.train import setup  # noqa: E402
from peftax.weights.headed import Headed  # noqa: E402

pytestmark = pytest.mark.parity
torch.set_num_threads(1)

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 41,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "attn_implementation": "eager",
}
MINILM = "pypi:{}#sha256={}".format(*asset.MINILM)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    @functools.cache
    def make(kind):
        torch.manual_seed(0)
        config = transformers.BertConfig(**SIZES, num_labels=3)
        model = getattr(transformers, kind)(config).to(torch.float32).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1 and bool((p == 1).all())))
        at = tmp_path_factory.mktemp(kind)
        model.save_pretrained(at)
        return model, at

    return make


def ours(at, **options):
    source = Headed(weights.open(at))
    model = models.build(source.config, **options)
    source.fit(models.abstract(model))
    params = weights.load(source, models.abstract(model))
    return jax.jit(lambda *a: model.apply({"params": params}, *a))


def close(a, b, tolerance=1e-5):
    worst = np.abs(np.asarray(a) - b).max() / np.abs(b).max()
    assert worst <= tolerance, f"{worst:.1e}"


def packed(*lengths):
    rng = np.random.default_rng(0)
    parts = [rng.integers(1, SIZES["vocab_size"], n).astype(np.int32) for n in lengths]
    rows = packing.pack([Example(p, np.ones(len(p), np.float32), label=0) for p in parts], sum(lengths) + 2)
    return parts, [rows[k] for k in ("tokens", "positions", "segment_ids")]


def test_hidden_states_of_packed_rows(saved):
    reference, at = saved("BertModel")
    parts, row = packed(8, 3, 6)
    h, start = np.asarray(ours(at)(*row)), 0
    for part in parts:
        with torch.no_grad():
            expected = reference(torch.tensor(part[None]).long()).last_hidden_state.numpy()
        close(h[:, start : start + len(part)], expected)
        start += len(part)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_logits_of_a_classifier(saved, scan):
    reference, at = saved("BertForSequenceClassification")
    parts, row = packed(8, 3, 6)
    logits, start = np.asarray(ours(at, labels=3, scan=scan)(*row)), 0
    for part in parts:
        with torch.no_grad():
            expected = reference(torch.tensor(part[None]).long()).logits.numpy()
        close(logits[:, start : start + len(part)], np.repeat(expected[:, None], len(part), 1))
        start += len(part)


@pytest.mark.slow  # the real weights and sentences, from the package index
def test_minilm():
    base = setup.open_base(path=MINILM)
    reference = transformers.BertModel.from_pretrained(base.path, attn_implementation="eager").eval()
    texts = [row["text"] for row in movie_reviews.examples("valid")[:6]]
    given = base.tokenizer(texts, padding=True, return_tensors="np")
    with torch.no_grad():
        expected = reference(**{k: torch.tensor(v) for k, v in given.items()}).last_hidden_state.numpy()
    held = given["attention_mask"].astype(np.int32)
    h = np.asarray(base.model.apply({"params": base.params}, given["input_ids"].astype(np.int32), None, held))
    close(h[held > 0], expected[held > 0])
