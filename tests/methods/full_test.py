import jax
import pytest

from peftax.core import tree
from peftax.methods.full import full
from tests.methods import llama_3b, tiny


def test_everything_trains():
    frozen, trainable = full().init(jax.random.key(0), tiny.params(), tiny.found())
    assert not tree.flatten(frozen)
    assert tree.flatten(trainable).keys() == tree.flatten(tiny.params()).keys()


@pytest.mark.parametrize("targets", [r"lm_head|.*\.mlp\..*", ["lm_head", "gate_proj", "up_proj", "mlp.down_proj"]])
def test_some_modules(targets):
    _, trainable = full(targets=targets).init(jax.random.key(0), tiny.params(), tiny.found())
    names = {p.split("/")[-2] for p in tree.flatten(trainable)}
    assert names == {"lm_head", "gate_proj", "up_proj", "down_proj"}


def test_one_layer_needs_an_unrolled_model():
    method = full(targets=r"model\.layers\.1\..*")
    with pytest.raises(ValueError, match="scan=False"):
        method.init(jax.random.key(0), tiny.params(), tiny.found())
    _, trainable = method.init(jax.random.key(0), tiny.params(False), tiny.found(False))
    assert all(p.startswith("model/layers/1/") for p in tree.flatten(trainable))


def test_counts_are_those_of_pefts_run():
    """The one that fine-tunes all of Llama 3.2 3B."""
    assert llama_3b.count_of(full()) == {"trainable": 3_212_749_824, "total": 3_212_749_824}
