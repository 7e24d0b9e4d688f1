import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax import models
from peftax.core import injection, sites, tree
from peftax.data.chat import Example
from peftax.data.packing import pack, pad
from peftax.methods.lora import lora
from peftax.train import evaluate

CONFIG = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
MODEL = models.build(CONFIG)
RNG = np.random.default_rng(0)


def params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = models.abstract(MODEL)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)


def examples(grouped=True):
    out = []
    for n in (5, 9, 4, 7, 6):
        weights = np.ones(n, np.float32)
        weights[: n // 2] = 0
        groups = (np.arange(n) % 3 == 0).astype(np.int32) if grouped else None
        out.append(Example(RNG.integers(0, 31, n).astype(np.int32), weights, groups))
    return out


def expected(p, examples):
    """Per example (sum over values, sum over boilerplate), by plain logits."""
    out = []
    tokens = np.stack([np.pad(e.tokens, (0, 12 - len(e.tokens))) for e in examples])
    logits = jax.jit(MODEL.apply)({"params": p}, tokens)
    logp = np.asarray(jax.nn.log_softmax(logits))
    for row, e in zip(logp, examples, strict=True):
        nll = -row[np.arange(len(e.tokens) - 1), e.tokens[1:]] * e.weights[1:]
        out.append([nll[e.groups[1:] == 1].sum(), nll[e.groups[1:] == 0].sum()])
    return np.asarray(out)


def test_nll_is_weighted_by_token_and_told_apart():
    es, p = examples(), params()
    want = expected(p, es)
    n = np.asarray([[e.weights[1:][e.groups[1:] == g].sum() for g in (1, 0)] for e in es])
    got = evaluate.nll(MODEL.apply, p, pad(es, 12), batch_size=2)
    assert got["tokens"] == n.sum()
    np.testing.assert_allclose(got["nll"], want.sum() / n.sum(), rtol=1e-5)
    np.testing.assert_allclose(got["nll_values"], want[:, 0].sum() / n[:, 0].sum(), rtol=1e-5)
    np.testing.assert_allclose(got["nll_boilerplate"], want[:, 1].sum() / n[:, 1].sum(), rtol=1e-5)
    np.testing.assert_allclose(got["per_row"]["nll"], want.sum(axis=1) / n.sum() * 5, rtol=1e-5)
    for key, rows in got["per_row"].items():
        np.testing.assert_allclose(np.mean(rows), got[key], rtol=1e-9)


def test_packing_and_batching_change_nothing():
    es, p = examples(), params()
    padded = evaluate.nll(MODEL.apply, p, pad(es, 12))
    rows = pack(es, 16)
    packed = evaluate.nll(MODEL.apply, p, rows)
    batches = [{k: v[i : i + 1] for k, v in rows.items()} for i in range(len(rows["tokens"]))]
    batched = evaluate.nll(MODEL.apply, p, iter(batches))
    for key in ("nll", "nll_values", "nll_boilerplate", "tokens"):
        np.testing.assert_allclose(packed[key], padded[key], rtol=1e-5)
        np.testing.assert_allclose(batched[key], packed[key], rtol=1e-5)
    np.testing.assert_allclose(np.sort(packed["per_row"]["nll"]), np.sort(padded["per_row"]["nll"]), rtol=1e-5)


def test_nll_compiles_once_for_a_shape_and_takes_an_injected_apply():
    es = examples(grouped=False)
    method = lora(rank=2)
    found = sites.find(MODEL.apply, params(), jnp.zeros((1, 2), jnp.int32))
    apply = injection.inject(MODEL.apply, method)
    part = method.init(jax.random.key(0), params(), found)
    whole = tree.merge(part.frozen, part.trainable)
    adapted = evaluate.nll(apply, whole, pad(es, 11), batch_size=2)
    programs = evaluate._at_tokens._cache_size()
    evaluate.nll(apply, jax.tree.map(lambda x: x * 2, whole), pad(es[:4], 11), batch_size=2)
    assert evaluate._at_tokens._cache_size() == programs
    base = evaluate.nll(MODEL.apply, params(), pad(es, 11), batch_size=2)
    np.testing.assert_allclose(adapted["nll"], base["nll"], rtol=1e-5)  # B is zero
    assert set(base["per_row"]) == {"nll"} and "nll_values" not in base


def test_nll_of_nothing_is_an_error():
    rows = pad(examples(), 12)
    rows["weights"][:] = 0
    with pytest.raises(ValueError, match="no token"):
        evaluate.nll(MODEL.apply, params(), rows)


def row(name, tools=1):
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    listed = [{"name": f"{name}{i or ''}", "description": "", "parameters": schema} for i in range(tools)]
    return {"question": "?", "tools": listed, "answer": {"name": name, "arguments": {"x": [3]}}}


ROWS = [row("f"), row("g", 2), row("h", 2), row("k")]
ANSWERS = [
    '[{"name":"f","arguments":{"x":3}}]',
    '[{"name":"g","arguments":{"x":4}}]',
    '[{"name":"h","arguments":{"x":3}}]',
    "I do not know.",
]


def test_function_calls_are_scored_with_two_tools_apart():
    got = evaluate.function_calls(lambda prompts: [ANSWERS[p] for p in prompts], range(4), ROWS)
    assert got["all"] == {"rows": 4, "parse": 0.75, "name": 0.75, "match": 0.5}
    assert got["2+ tools"] == {"rows": 2, "parse": 1.0, "name": 1.0, "match": 0.5}
    assert got["texts"] == ANSWERS
    assert got["per_row"]["match"].tolist() == [1, 0, 1, 0]
    assert got["per_row"]["match, 2+ tools"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="3 answers for 4 rows"):
        evaluate.function_calls(lambda prompts: ANSWERS[:3], None, ROWS)


def test_bootstrap_interval():
    rng = np.random.default_rng(1)
    a = rng.normal(0, 5, 400)
    b = a + rng.normal(0.5, 1, 400)  # paired: the spread of a does not matter
    mean, low, high = evaluate.paired_bootstrap(a, b, draws=2000)
    np.testing.assert_allclose(mean, (b - a).mean(), rtol=1e-12)
    half = 1.96 * (b - a).std() / 20
    np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.02)
    assert evaluate.paired_bootstrap(a, b, draws=2000) == (mean, low, high)
    assert evaluate.paired_bootstrap([1, 2], [1, 2]) == (0, 0, 0)
    with pytest.raises(ValueError, match="not paired"):
        evaluate.paired_bootstrap([1, 2], [1])


def test_compare_and_its_table():
    before = evaluate.function_calls(lambda _: ["no"] * 4, None, ROWS)
    after = evaluate.function_calls(lambda _: ANSWERS, None, ROWS)
    table = evaluate.compare(before, after, draws=500)
    assert table["match"]["before"] == 0 and table["match"]["after"] == 0.5
    assert table["match"]["difference"] == 0.5 and table["match"]["rows"] == 4
    assert 0 <= table["match"]["low"] < 0.5 < table["match"]["high"] <= 1
    table |= {"nll": dict(before=2.0, after=1.5, difference=-0.5, low=-0.6, high=-0.4, rows=4)}
    text = evaluate.markdown(table, names=("base", "tuned"))
    assert text.startswith("| | base | tuned |")
    assert "| nll | 2.000 | 1.500 | -0.500 [-0.600, -0.400] | 4 |" in text
    assert "| parse % | 0.0 | 75.0 | +75.0 [" in text
