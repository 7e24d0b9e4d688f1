import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import injection, sites, tree
from peftax.core.method import Ctx, Kernel
from peftax.methods.fourierft import HF, fourierft, places, product
from tests.methods import hand, llama_3b, tiny

SMALL = {"frequencies": 60, "alpha": 30.0}
TOY = {"frequencies": 6, "alpha": 10.0}


def test_by_hand():
    """c = [6, 12] at (0, 1) and (1, 0): 6 / 6 cos(pi i) + 12 / 6 cos(2 pi o / 3) = [[3, 0, 0], [1, -2, -2]].

    x = [1, 2] times it is [5, -4, -4], on [6, 5, 2].
    """
    leaves = {"c": jnp.array([6.0, 12.0]), "at": jnp.array([[0, 1], [1, 0]]), "scale": jnp.ones(2)}
    y, kernel, bias = hand.outcome(fourierft(frequencies=2, targets=["layers_0"]), leaves)
    np.testing.assert_allclose(y, [[11, 1, -2]], atol=1e-5)
    np.testing.assert_allclose(kernel, [[4, 0, 1], [3, 0, -2]], atol=1e-6)
    assert bias == [1.0, 1.0, 1.0]


def test_alpha_is_the_updates_factor():
    frozen, _ = fourierft(frequencies=2, alpha=7.0, targets=["layers_0"]).init(
        jax.random.key(0), hand.PARAMS, sites.find(hand.MODEL.apply, hand.PARAMS, hand.X)
    )
    assert frozen["layers_0"]["fourierft"]["default"]["scale"].tolist() == [7.0, 7.0]


@pytest.mark.parametrize("n_in, n_out", [(6, 8), (7, 5), (1, 4), (8, 1)])
def test_every_frequency_alone(n_in, n_out):
    """Edges, halves and their mirrors, of even and odd lengths: numpy's ifft2 of one entry, and its slopes."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, n_in)), jnp.float32)
    for u in range(n_out):
        for v in range(n_in):
            spectrum = np.zeros((n_out, n_in))
            spectrum[u, v] = 5.0
            update = np.fft.ifft2(spectrum).real.T
            y, back = jax.vjp(functools.partial(product, at=np.array([[u, v]]), n_out=n_out), x, jnp.array([5.0]))
            np.testing.assert_allclose(y, x @ update, atol=1e-5)
            dx, dc = back(jnp.ones_like(y))
            np.testing.assert_allclose(dx, np.ones(y.shape) @ update.T, atol=1e-5)
            np.testing.assert_allclose(dc, [(np.asarray(x) @ update).sum() / 5], atol=1e-5)


def test_many_frequencies_make_the_update():
    """Three tokens' entries are more than the kernel's, one token's are not: the same numbers and slopes."""
    rng = np.random.default_rng(0)
    x, c, dy = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in ((3, 6), (40,), (3, 8)))
    both = functools.partial(product, at=jnp.asarray(places(0, 6, 8, 40)), n_out=8)
    alone = jax.vmap(both, in_axes=(0, None))
    made = [str(jax.make_jaxpr(f)(x, c)) for f in (both, alone)]
    assert ["[6,8]" in text for text in made] == [True, False]
    (y, back), (expected, back_alone) = jax.vjp(both, x, c), jax.vjp(alone, x, c)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for slope, other in zip(back(dy), back_alone(dy), strict=True):
        np.testing.assert_allclose(slope, other, atol=1e-5)


PLACES = [[1, 7], [1, 1], [4, 7], [3, 3]]


def test_places_are_those_of_peft():
    """torch.randperm(40, generator=torch.Generator().manual_seed(777))[:4] as (row, column) of [5, 8]."""
    assert places(777, 8, 5, 4).tolist() == PLACES
    assert places(777, 8, 5, 40).tolist()[:4] == PLACES and len(set(map(tuple, places(777, 8, 5, 40)))) == 40


def test_nothing_of_the_kernels_size_is_made():
    call = fourierft(frequencies=9).parts[0].call
    theta = {"c": jnp.ones(9), "at": jnp.asarray(places(0, 50, 40, 9)), "scale": jnp.ones(9)}
    w = jnp.ones((50, 40))

    def loss(c, x):
        return call({"default": {**theta, "c": c}}, x, Kernel(w), Ctx(), "").sum()

    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(theta["c"], jnp.ones((7, 50))))
    made = [line.split(" = ")[0] for line in program.splitlines() if " = " in line]
    assert not [line for line in made if "[50,40]" in line or "[40,50]" in line]
    assert "fft" in program


def test_transforms_are_float32s():
    theta = {"c": jnp.full(1, 1.001), "at": jnp.zeros((1, 2), jnp.int32), "scale": jnp.full(1, 1000.0)}
    x, k = jnp.ones((1, 1), jnp.bfloat16), Kernel(-jnp.full((1, 1), 1000.0, jnp.bfloat16))
    y = fourierft(frequencies=1).parts[0].call({"default": theta}, x, k, Ctx(), "")
    assert y.dtype == jnp.bfloat16 and float(y[0, 0]) == 1.0  # 1.001 is 1 in bfloat16


def test_layers_of_unlike_frequencies_in_one_stack():
    """What pads the shorter one gets no slope; the numbers are the unrolled model's, the count is the real one."""
    method = tiny.method("fourierft", frequency_pattern={r"layers\.1\..*": 7})
    part = method.init(jax.random.key(0), tiny.params(), tiny.found())
    wide = tiny.unstack(part.trainable)["model"]["layers"]["1"]["self_attn"]["q_proj"]["fourierft"]["default"]["c"]
    assert wide.shape == (60,) and not wide[7:].any()
    assert sites.count(method, tiny.params(), tiny.found())["trainable"] == 7 * (60 + 7)
    loud = jax.tree.map(lambda x: x + 1.0, part.trainable)
    tokens = tiny.batch()["tokens"]

    @jax.jit
    @jax.grad
    def slopes(trainable):
        apply = injection.inject(tiny.model().apply, method)
        return jnp.square(apply({"params": tree.merge(part.frozen, trainable)}, tokens)).mean()

    for path, slope in tree.flatten(slopes(loud)).items():
        assert slope[0].all() and slope[1, :7].all() and not slope[1, 7:].any(), path
    other = method.init(jax.random.key(0), tiny.params(scan=False), tiny.found(scan=False))
    ours = injection.inject(tiny.model().apply, method)({"params": tree.merge(*part)}, tokens)
    theirs = injection.inject(tiny.model(scan=False).apply, method)({"params": tree.merge(*other)}, tokens)
    assert tiny.distance(ours, theirs) <= 1e-5


def test_starts_at_the_base_with_zeros():
    _, trainable = tiny.method("fourierft", init="zeros").init(jax.random.key(0), tiny.params(), tiny.found())
    assert not any(x.any() for x in jax.tree.leaves(trainable))


def test_biases_under_pefts_name():
    config = {"peft_type": "FOURIERFT", "target_modules": ["q_proj"], "bias": "fourier_only"}
    assert HF.read(config)["bias"] == "fourierft_only"
    assert HF.write(fourierft(bias="fourierft_only", targets=["q_proj"]).config)["bias"] == "fourier_only"


@pytest.mark.parametrize("frequencies, total", [(1000, 3_212_805_824), (5000, 3_213_029_824)])
def test_counts_are_those_of_pefts_runs(frequencies, total):
    config = {"peft_type": "FOURIERFT", "n_frequency": frequencies, "target_modules": ["q_proj", "v_proj"]}
    assert llama_3b.count(config) == {"trainable": 56 * frequencies, "total": total}


def test_settings_are_checked():
    with pytest.raises(ValueError, match="fourierft: frequencies 0 must be at least 1"):
        fourierft(frequency_pattern={"q_proj": 0})
    with pytest.raises(ValueError, match="fourierft: init 'ones' is none of 'gaussian', 'zeros'"):
        fourierft(init="ones")
    with pytest.raises(ValueError, match=r"frequencies 1000 are more than the 480 entries of a kernel \[24, 20\]"):
        fourierft(targets=["k_proj"]).init(jax.random.key(0), tiny.params(), tiny.found())
