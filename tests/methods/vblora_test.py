import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core.method import Ctx, Kernel
from peftax.methods.vblora import HF, vblora
from tests.methods import hand, llama_3b, tiny

SMALL = {"length": 4, "vectors": 16, "bank_bound": 0.3, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
TOY = {"length": 1, "vectors": 16, "bank_bound": 0.3}


def test_by_hand():
    """The two largest of three logits are as likely (or three to one); the third vector, of the least, has no part."""
    three = float(np.log(3.0))
    leaves = {
        # inputs take [1, 1] / 2 of vectors 0, 1 and 3 : 1 of vectors 1, 2
        "logits_a": jnp.array([[[0.0, 0.0, -9.0], [-9.0, three, 0.0]]]),
        # outputs: vector 0 and 1, 0 and 2, 1 and 2 in equal parts
        "logits_b": jnp.array([[[5.0, 5.0, 4.0]], [[0.0, -1.0, 0.0]], [[-1.0, 2.0, 2.0]]]),
    }
    method = vblora(rank=1, vectors=3, length=1, targets=["layers_0"])
    y, kernel, _ = hand.outcome(method, leaves, shared={"bank": jnp.array([[2.0, 4.0, 8.0]])})
    # A = [3, 0.75 * 4 + 0.25 * 8] = [3, 5]; B = [3, 5, 6]; x A = 13
    np.testing.assert_allclose(y, [[6 + 39, 5 + 65, 2 + 78]], rtol=1e-6)
    np.testing.assert_allclose(kernel, [[10, 15, 19], [17, 27, 30]], rtol=1e-6)


def test_the_bank_stands_once_and_trains():
    frozen, trainable = tiny.method("vblora").init(jax.random.key(0), tiny.params(), tiny.found())
    assert trainable["vblora"]["default"]["bank"].shape == (4, 16) and "vblora" not in frozen


def test_vectors_are_chosen_in_float32():
    """1 and 1.001 are one number in bfloat16."""
    theta = {"logits_a": jnp.array([[[1.0, 1.001]]]), "logits_b": jnp.array([[[1.001, 1.0]]])}
    theta["bank"] = jnp.array([[1.0, 4.0]])
    call = vblora(rank=1, vectors=2, length=1, topk=1).parts[0].call
    y = call({"default": theta}, jnp.ones((1, 1), jnp.bfloat16), Kernel(jnp.zeros((1, 1), jnp.bfloat16)), Ctx(), "")
    assert float(y[0, 0]) == 4.0 and y.dtype == jnp.bfloat16


def test_a_length_that_does_not_divide():
    method = vblora(length=256, targets=["q_proj", "o_proj"])
    with pytest.raises(ValueError, match="vblora: length 256 must divide.*that divides 24, 40 is 8"):
        method.init(jax.random.key(0), tiny.params(), tiny.found())


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("vectors, dtype", [(255, np.uint8), (256, np.int16)])
def test_the_small_file(topk, vectors, dtype):
    rng = np.random.default_rng(0)
    key, config = "base_model.model.q.vblora_logits_A", {"topk": topk, "vectors": vectors, "save_topk": True}
    logits = rng.normal(size=(2, 3, vectors)).astype(np.float32)
    assert HF.opened and HF.closed
    small = HF.closed({key: logits, "other": np.zeros(1)}, config)
    assert {k: v.shape for k, v in small.items()} == {
        "other": (1,),
        f"{key}_topk_indices": (2, 3, topk),
        f"{key}_topk_weights": (2, 3, topk - 1),
    }
    assert small[f"{key}_topk_indices"].dtype == dtype
    again = HF.opened(small, config)
    assert again.keys() == {"other", key} and again[key].dtype == np.float32
    assert (np.isfinite(again[key]).sum(-1) == topk).all()

    def mixed(x):
        return jax.nn.softmax(jnp.where(x >= np.sort(x, -1)[..., -topk:][..., :1], x, -jnp.inf))

    np.testing.assert_allclose(mixed(again[key]), mixed(logits), atol=1e-6)
    with pytest.raises(ValueError, match="holds .*_topk_indices' and no .*_topk_weights"):
        HF.opened({k: v for k, v in small.items() if not k.endswith("weights")}, config)


def test_counts_are_those_of_pefts_run():
    config = {"peft_type": "VBLORA", "target_modules": ["q_proj", "v_proj"]}
    assert llama_3b.count(config)["trainable"] == 1_212_416


def test_settings_are_checked():
    with pytest.raises(ValueError, match="vblora: vectors 0 must be at least 1"):
        vblora(vectors=0)
    with pytest.raises(ValueError, match="vblora: topk 5 must be at most vectors 4"):
        vblora(topk=5, vectors=4)
