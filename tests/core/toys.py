"""Small linen models that know nothing of peftax, one for each way to write a product."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from peftax.core import injection, sites


class Mlp(nn.Module):
    """Dense, with and without a bias."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(7, name="up")(x))
        return nn.Dense(3, use_bias=False, name="down")(x)


class General(nn.Module):
    """DenseGeneral over several axes, in and out."""

    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((2, 5), name="split")(x)
        x = nn.DenseGeneral((3, 2), axis=(-2, -1), name="both")(x)
        return nn.DenseGeneral(4, axis=(1, -1), use_bias=False, name="across")(x)


class Gemma(nn.Module):
    """Attention's projections as in Gemma: kernels [N, D, H] and [N, H, D]."""

    @nn.compact
    def __call__(self, x):
        q = nn.Einsum((2, 6, 4), "BTD,NDH->BTNH", use_bias=False, name="q_einsum")(x)
        return nn.Einsum((2, 4, 6), "BTNH,NHD->BTD", use_bias=False, name="out_einsum")(nn.tanh(q))


class Encoder(nn.Module):
    """linen's own attention block."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm(name="norm")(x))
        return nn.Dense(5, name="out")(x)


class Cnn(nn.Module):
    """Convolutions: strided, padded, dilated."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, (3, 2), strides=(2, 1), name="first")(x))
        x = nn.relu(nn.Conv(4, (2, 2), padding=1, kernel_dilation=2, use_bias=False, name="second")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Head(nn.Module):
    def __call__(self, x, table):
        return table.attend(x)


class Tied(nn.Module):
    """One table, two sites: the lookup and the head. `tied=False` has a head of its own."""

    tied: bool = True

    def setup(self):
        self.embed = nn.Embed(11, 6)
        self.mix = nn.Dense(6)
        self.lm_head = Head() if self.tied else nn.Dense(11, use_bias=False)

    def __call__(self, ids):
        h = nn.tanh(self.mix(self.embed(ids)))
        return self.lm_head(h, self.embed) if self.tied else self.lm_head(h)


class Attend(nn.Module):
    """A tied head whose caller holds the table."""

    def setup(self):
        self.embed = nn.Embed(11, 6)

    def __call__(self, ids):
        return self.embed.attend(nn.tanh(self.embed(ids)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(6, name="down")(nn.tanh(nn.Dense(9, name="up")(x))), None


class Expert(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, use_bias=False, name="down")(nn.tanh(nn.Dense(5, name="up")(x)))


class Bank(nn.Module):
    """Four experts, each on rows of its own, as two stacks of kernels."""

    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Einsum((4, 6, 5), "ECD,EDF->ECF", name="up")(x))
        return nn.Einsum((4, 5, 6), "ECF,EFD->ECD", use_bias=False, name="down")(h)


class Moe(nn.Module):
    """All experts on all rows, weighed by a router; as einsums, or one expert under nn.vmap with the same tree."""

    mapped: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        gates = nn.softmax(nn.Dense(4, name="router")(x))
        each = jnp.einsum("ce,cd->ecd", gates, x)
        experts = nn.vmap(Expert, variable_axes={"params": 0}, split_rngs={"params": True}) if self.mapped else Bank
        return x + experts(name="experts")(each).sum(0), None


class MappedMoe(Moe):
    mapped: bool = True


class One(nn.Module):
    """One block alone."""

    block: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        return self.block(name="block")(x)[0]


class Stack(nn.Module):
    """Three blocks: in one scan with remat, or one after the other."""

    scan: bool = True
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        if self.scan:
            scanned = nn.scan(nn.remat(self.block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scanned(name="layers")(x, None)[0]
        return Unrolled(self.block, name="layers")(x)


class Unrolled(nn.Module):
    block: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x, _ = self.block(name=str(i))(x, None)
        return x


def _floats(*shape):
    return jnp.asarray(np.random.default_rng(7).standard_normal(shape), jnp.float32)


IDS = jnp.array([[1, 4, 10, 0, 3], [9, 2, 2, 8, 6]])
ALL = {
    "mlp": (Mlp(), _floats(2, 5)),
    "general": (General(), _floats(2, 3, 5)),
    "gemma": (Gemma(), _floats(2, 3, 6)),
    "encoder": (Encoder(), _floats(2, 3, 6)),
    "cnn": (Cnn(), _floats(2, 7, 6, 3)),
    "tied": (Tied(), IDS),
    "attend": (Attend(), IDS),
    "scan": (Stack(), _floats(2, 6)),
    "unrolled": (Stack(scan=False), _floats(2, 6)),
    "bank": (One(Moe), _floats(3, 6)),
    "mapped": (One(MappedMoe), _floats(3, 6)),
    "scanned_bank": (Stack(block=Moe), _floats(3, 6)),
    "unrolled_bank": (Stack(scan=False, block=Moe), _floats(3, 6)),
    "scanned_mapped": (Stack(block=MappedMoe), _floats(3, 6)),
}


@functools.cache
def build(name):
    """(model, params, input)."""
    model, x = ALL[name]
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    return model, numbers(shapes), x


def numbers(shapes, seed=0):
    """Any values, of a size that keeps activations near 1; numpy draws them without a compile."""
    rng = np.random.default_rng(seed)

    def draw(s):
        size = 0.1 if len(s.shape) < 2 else 1 / np.sqrt(s.shape[-2])
        return jnp.asarray(rng.normal(0, size, s.shape) + (len(s.shape) < 2), s.dtype)

    return jax.tree.map(draw, shapes)


@functools.cache
def found(name):
    """(model, params, input, sites)."""
    model, params, x = build(name)
    return model, params, x, sites.find(model.apply, params, x)


def start(method, params, all_sites, seed=0):
    """The method's partition; one compile is faster than many small programs."""
    return jax.jit(lambda key, p: method.init(key, p, all_sites))(jax.random.key(seed), params)


def fold(method, merged, all_sites):
    return jax.jit(lambda p: method.fold(p, all_sites))(merged)


def run(model, method, params, x, **kwargs):
    """The adapted model's output."""
    return jax.jit(lambda p, x: injection.inject(model.apply, method)({"params": p}, x, **kwargs))(params, x)


def perturb(trainable, seed=1):
    """Noise of the leaf's own size (0.3 where it is zero): away from the identity, unlike in every layer."""
    rng = np.random.default_rng(seed)

    def noisy(x):
        size = float(np.sqrt(np.mean(np.square(x)))) or 0.3
        return x + jnp.asarray(rng.normal(0, size, x.shape), x.dtype)

    return jax.tree.map(noisy, trainable)


def close(a, b, tolerance):
    """The largest difference relative to the largest value."""
    size = max(float(jnp.abs(a).max()), float(jnp.abs(b).max()), 1e-30)
    worst = float(jnp.abs(a - b).max()) / size
    assert worst <= tolerance, f"{worst:.2e} > {tolerance:.0e}"
