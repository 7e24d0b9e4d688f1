"""Rules that pack kernels: which they name, what they cost, what they refuse."""

import jax
import jax.numpy as jnp
import pytest

from peftax import models
from peftax.core import quantization, sites, tree
from tests.methods import tiny

CONFIG = {**tiny.CONFIG, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


@pytest.fixture(scope="module")
def shapes():
    return models.abstract(models.build(CONFIG))


@pytest.fixture(scope="module")
def found(shapes):
    return sites.find(models.build(CONFIG).apply, shapes, jax.ShapeDtypeStruct((1, 3), jnp.int32))


def test_the_first_rule_wins(shapes, found):
    rules = (("down_proj", None), ("mlp", {"fmt": "int8"}), ("_proj", {"fmt": "nf4", "group": 32}))
    made = tree.flatten(quantization.quantize(shapes, rules, found))
    at = "model/layers/"
    assert not tree.is_packed(made[f"{at}mlp/down_proj/kernel"])
    assert made[f"{at}mlp/up_proj/kernel"].fmt == "int8"
    q = made[f"{at}self_attn/q_proj/kernel"]
    assert (q.fmt, q.group, q.shape) == ("nf4", 32, shapes["model"]["layers"]["self_attn"]["q_proj"]["kernel"].shape)


def test_report_counts_bytes(shapes, found):
    made = quantization.quantize(shapes, (("_proj", {"fmt": "nf4", "group": 32}),), found)
    said = quantization.report(shapes, made)
    assert "nf4: 7 kernels" in said and "5.000 bits each" in said  # 4 and an f32 for every 32


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (("no_such", {"fmt": "nf4"}), "rule 'no_such' matches no linear kernel; nearest: "),
        (("embed_tokens", {"fmt": "nf4"}), "matches no linear kernel; only kernels of two axes in linear layers"),
        (("_proj", {"fmt": "nf5"}), "wants format 'nf5'; nearest: 'nf4'"),
        (("_proj", {"fmt": "nf4", "group": 48}), "kernel': nf4 has no group 48; it has 32, 64"),
        (("_proj", {"fmt": "nf4", "block": 32}), "has keys"),
        (("_proj", {"fmt": "nf4", "group": 64}), "down_proj/kernel.*96.*64"),
        (("_proj", {"fmt": "file"}), "there is no file; name a format"),
    ],
)
def test_what_is_refused(shapes, found, rule, words):
    with pytest.raises(ValueError, match=words):
        quantization.quantize(shapes, (rule,), found)
