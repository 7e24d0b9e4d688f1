"""Logits equal transformers' on random tiny models of every kind that models/llama.py builds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: run with .venv-parity")

import transformers  # noqa: E402

from peftax import models, weights  # noqa: E402

pytestmark = pytest.mark.parity
torch.set_num_threads(1)

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 41,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS = {
    "llama": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "head_dim": 10}),
    "llama_linear_rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "mistral_window": ("mistral", {"sliding_window": 5, "head_dim": 6}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 6}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3_biases": ("qwen3", {"head_dim": 6, "attention_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "smollm3_interval": ("smollm3", {"no_rope_layer_interval": 2, "tie_word_embeddings": False}),
    "smollm3_window": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 4},
    ),
}
T = 19


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    @functools.cache
    def make(name):
        kind, extra = KINDS[name]
        config = transformers.AutoConfig.for_model(kind, **{**SIZES, **extra})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
        with torch.no_grad():  # what starts at zero or one would hide a missing product
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.5) + (p.ndim == 1 and bool((p == 1).all())))
        at = tmp_path_factory.mktemp(name)
        model.save_pretrained(at)
        return model, at

    return make


@functools.cache
def _ours(at, scan):
    source = weights.open(at)
    model = models.build(source.config, scan=scan)
    return model, weights.load(source, models.abstract(model))


def ours(at, scan=True):
    model, params = _ours(at, scan)
    return model, jax.jit(lambda *a: model.apply({"params": params}, *a)), params


def tokens(rows=2, length=T, seed=0):
    return np.random.default_rng(seed).integers(1, SIZES["vocab_size"], (rows, length)).astype(np.int32)


def theirs(model, ids, mask=None):
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask).long()
        return model(input_ids=torch.tensor(ids).long(), attention_mask=mask, use_cache=False).logits.numpy()


def close(a, b, tolerance=1e-4):
    a, b = np.asarray(a), np.asarray(b)
    worst = np.abs(a - b).max() / np.abs(b).max()
    assert worst <= tolerance, f"{worst:.1e}"


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", KINDS)
def test_logits(folder, name, scan):
    reference, at = folder(name)
    _, apply, _ = ours(at, scan)
    close(apply(tokens()), theirs(reference, tokens()))


@pytest.mark.parametrize("name", ["mistral_window", "qwen2_window", "smollm3_window"])
def test_the_window_matters(folder, name):
    """Else the test above would pass without one."""
    reference, at = folder(name)
    source = weights.open(at)
    open_ = models.build({**source.config, "sliding_window": None})
    logits = open_.apply({"params": weights.load(source, models.abstract(open_))}, tokens())
    assert np.abs(np.asarray(logits) - theirs(reference, tokens())).max() > 0.1


@pytest.mark.parametrize("name", ["llama", "mistral_window", "smollm3"])
def test_left_padding(folder, name):
    """Positions and segments are data: padding on either side changes nothing."""
    reference, at = folder(name)
    _, apply, _ = ours(at)
    ids, pad = tokens(1, 12, seed=3), 7
    padded = np.concatenate([np.full((1, pad), 5, np.int32), ids], 1)
    segments = (np.arange(T) >= pad)[None].astype(np.int32)
    positions = np.maximum(np.arange(T) - pad, 0)[None].astype(np.int32)
    close(apply(padded, positions, segments)[:, pad:], theirs(reference, ids))
    right = np.concatenate([ids, np.full((1, pad), 5, np.int32)], 1)
    close(apply(right, np.arange(T)[None], segments[:, ::-1])[:, :12], theirs(reference, ids))


@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen2_window", "smollm3"])
def test_packing(folder, name):
    reference, at = folder(name)
    _, apply, _ = ours(at)
    parts = [tokens(1, n, seed=n) for n in (8, 3, 6)]
    row = np.concatenate([*parts, np.zeros((1, 2), np.int32)], 1)
    segments = np.repeat([1, 2, 3, 0], [8, 3, 6, 2])[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (8, 3, 6, 2)])[None].astype(np.int32)
    logits, start = np.asarray(apply(row, positions, segments)), 0
    for part in parts:
        n = part.shape[1]
        close(logits[:, start : start + n], theirs(reference, part))
        start += n


@pytest.mark.parametrize("name", ["llama_tied", "qwen3"])
def test_embeddings_as_input(folder, name):
    reference, at = folder(name)
    _, apply, params = ours(at)
    embedded = params["model"]["embed_tokens"]["embedding"][tokens()]
    with torch.no_grad():
        expected = reference(inputs_embeds=torch.tensor(np.asarray(embedded)), use_cache=False).logits.numpy()
    close(apply(embedded), expected)
    close(apply(embedded), apply(tokens()), 1e-6)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", ["llama", "mistral_window", "smollm3"])
def test_cache(folder, name, scan):
    """A left-padded prompt at once, then token by token, is the full forward pass of each row alone."""
    reference, at = folder(name)
    model, _, params = ours(at, scan)
    ids, pads, prompt = tokens(2, T, seed=5), np.array([0, 4]), 9
    segments = (np.arange(T)[None] >= pads[:, None]).astype(np.int32)
    positions = np.maximum(np.arange(T)[None] - pads[:, None], 0).astype(np.int32)

    @jax.jit
    def advance(cache, ids, positions, segments):
        h, cache = model.apply({"params": params}, ids, positions, segments, cache, method="hidden")
        return model.apply({"params": params}, h, method="head"), cache

    logits, cache = advance(model.init_cache(2, T + 3), ids[:, :prompt], positions[:, :prompt], segments[:, :prompt])
    steps = [logits]
    for t in range(prompt, T):
        logits, cache = advance(cache, *(x[:, t : t + 1] for x in (ids, positions, segments)))
        steps.append(logits)
    got = np.asarray(jnp.concatenate(steps, 1))
    assert int(cache["index"]) == T
    for row, pad in enumerate(pads):
        close(got[row : row + 1, pad:], theirs(reference, ids[row : row + 1, pad:]))


@pytest.mark.parametrize(
    "extra", [{}, {"use_sliding_window": True, "num_attention_heads": 64}], ids=["plain", "window"]
)
@pytest.mark.parametrize("kind", models.types())
def test_keys_that_a_config_leaves_out_mean_what_they_mean_there(kind, extra):
    """Published files may hold only what differs from their class."""
    whole = transformers.AutoConfig.for_model(kind, num_hidden_layers=30, **extra).to_dict()
    needed = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", *extra}
    needed |= {"num_attention_heads"}
    assert models.build({k: whole[k] for k in needed if k in whole}).config == models.build(whole).config
