"""What bits take away, low-rank factors bring back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import quantization, tree
from peftax.methods import inits
from peftax.methods.inits import loftq
from peftax.methods.lora import lora
from peftax.ops.qtensor import dense
from peftax.ops.quantize import quantize
from tests.methods import packed_test as packed


def pack(w):
    return quantize(w, "nf4", group=32)


@pytest.fixture(scope="module")
def w():
    """A falling spectrum on a noisy floor, as trained weights have."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 96)))[0] for n in (96, 160))
    return jnp.asarray((u * np.exp(-np.arange(96) / 8)) @ v.T + 0.003 * rng.normal(size=(96, 160)), jnp.float32)


def error(w, bits, a, b, scale):
    return float(jnp.linalg.norm(w - dense(bits) - scale * (a @ b)))


def test_takes_the_principal_part_of_the_rest(w):
    bits, a, b = loftq.alternate(w, pack, 8, 0.5)
    np.testing.assert_array_equal(dense(bits), dense(pack(w)))
    rest = np.linalg.svd(np.asarray(w - dense(bits)), compute_uv=False)
    assert error(w, bits, a, b, 0.5) == pytest.approx(np.sqrt(np.square(rest[8:]).sum()), rel=1e-4)


def test_turns_lessen_the_error(w):
    errors = [error(w, *loftq.alternate(w, pack, 8, 0.5, turns), 0.5) for turns in (1, 2, 5)]
    plain = float(jnp.linalg.norm(w - dense(pack(w))))
    assert errors[2] < errors[1] < errors[0] < 0.95 * plain


@pytest.mark.parametrize("name", ["pissa", "pissa_fast", "olora", "loftq"])
def test_starts_lessen_the_error_of_rounding(w, name):
    """Against plain QLoRA, whose B is zero; the base of a start that moves it is rounded after the move."""
    plain = float(jnp.linalg.norm(w - dense(pack(w))))
    if name == "loftq":
        bits, a, b = loftq.alternate(w, pack, 16, 0.5)
    else:
        a, b = getattr(inits.module(name), name)(jax.random.key(0), w, 16, 0.5)
        bits = pack(w - 0.5 * (a @ b))
    assert error(w, bits, a, b, 0.5) < 0.9 * plain


def test_fill_on_a_packed_base():
    """Layers of unlike rank; the base stays as it is, and the logits come nearer to the original's."""
    method = lora(rank=8, alpha=4.0, init="loftq", rank_pattern={"1.self_attn.q_proj": 3})
    rng = np.random.default_rng(1)
    flat = tree.flatten(packed.unpacked(packed.base()))
    kernels = {s.kernel for s in packed.found().values() if s.kernel.endswith("_proj/kernel")}
    flat = {p: x + jnp.asarray(rng.normal(0, 0.02, x.shape), x.dtype) if p in kernels else x for p, x in flat.items()}
    params = quantization.quantize(tree.unflatten(flat), packed.RULES, packed.found())
    part = method.init(jax.random.key(0), params, packed.found())
    filled = loftq.fill(part, method, packed.found(), lambda path, layer: np.asarray(flat[path][layer]))
    jax.tree.map(np.testing.assert_array_equal, part.frozen, filled.frozen)
    theta = tree.flatten(filled.trainable)
    for path in kernels:
        a, b = (theta[path.replace("kernel", f"lora/default/{leaf}")] for leaf in "ab")
        ranks = [8, 3] if "q_proj" in path else [8, 8]
        bits = dense(tree.flatten(params)[path])
        for layer, rank in enumerate(ranks):
            assert not a[layer, :, rank:].any() and not b[layer, rank:].any()
            rest = flat[path][layer] - bits[layer]
            left = rest - (4.0 / rank) * a[layer] @ b[layer]
            values = np.linalg.svd(np.asarray(rest), compute_uv=False)
            assert float(jnp.linalg.norm(left)) == pytest.approx(np.sqrt(np.square(values[rank:]).sum()), rel=1e-3)


def test_wants_a_packed_base():
    method = lora(init="loftq")
    part = method.init(jax.random.key(0), packed.unpacked(packed.base()), packed.found())
    with pytest.raises(ValueError, match="no target is packed in few bits; set config.model.quantize"):
        loftq.fill(part, method, packed.found(), lambda path, layer: np.zeros(()))


def test_a_scaled_start_is_refused():
    with pytest.raises(ValueError, match="init_scale 3.0 would spoil init='loftq'"):
        lora(init="loftq", init_scale=3.0)
