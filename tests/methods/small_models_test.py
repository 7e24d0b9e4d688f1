"""Every method on small linen models that are not ours: flax's own examples, rebuilt.

A new method is tested by being there. What its record says decides what is asked of it: where a model holds no
target of it, an error that names what the model holds.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax import methods
from peftax.core import injection, sites, tree
from peftax.core.method import parts
from tests.core import toys
from tests.methods import tiny


class Mlp(nn.Module):
    """The README's: features in, features out."""

    @nn.compact
    def __call__(self, x):
        for features in (9, 7):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(4)(x)


class Cnn(nn.Module):
    """MNIST's, its second pooling a stride."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, (3, 3))(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(6, (3, 2), strides=(2, 1), padding="VALID")(x))
        x = nn.relu(nn.Dense(8)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3)(x)


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.Dense(11)(x))
        return nn.Dense(x.shape[-1])(h)


class Encoder1DBlock(nn.Module):
    """WMT's and ViT's encoder block."""

    @nn.compact
    def __call__(self, x, mask=None):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, mask=mask)
        return x + MlpBlock()(nn.LayerNorm()(x))


class TransformerLM(nn.Module):
    """LM1B's with logits_via_embedding: its decoder attends to the table that looked the tokens up."""

    tied: bool = True

    def setup(self):
        self.shared_embedding = nn.Embed(13, 6)
        self.decoder = Encoder1DBlock()
        self.logits = toys.Head() if self.tied else nn.Dense(13, use_bias=False)

    def __call__(self, ids):
        x = self.shared_embedding(ids)
        x = self.decoder(x, nn.make_causal_mask(ids))
        return self.logits(x, self.shared_embedding) if self.tied else self.logits(x)


def floats(*shape):
    return jnp.asarray(np.random.default_rng(5).standard_normal(shape), jnp.float32)


IDS = jnp.asarray(np.random.default_rng(6).integers(0, 13, (3, 5)))
# model, its input, a block for methods that stand around modules
MODELS = {
    "mlp": (Mlp(), floats(6, 5), "Dense_1"),
    "cnn": (Cnn(), floats(4, 8, 7, 2), "Conv_1"),
    "encoder": (Encoder1DBlock(), floats(3, 5, 6), "MlpBlock_0"),
    "lm": (TransformerLM(), IDS, "decoder"),
    "experts": (toys.One(toys.Moe), floats(7, 6), ".*experts"),
    "mapped_experts": (toys.One(toys.MappedMoe), floats(7, 6), r".*experts\.\d"),
}
# site -> (kind, [in, out], stack)
SITES = {
    "mlp": {"Dense_0": ("linear", (5, 9), ()), "Dense_1": ("linear", (9, 7), ()), "Dense_2": ("linear", (7, 4), ())},
    "cnn": {
        "Conv_0": ("conv", (18, 5), ()),
        "Conv_1": ("conv", (30, 6), ()),
        "Dense_0": ("linear", (12, 8), ()),
        "Dense_1": ("linear", (8, 3), ()),
    },
    "encoder": {
        **{f"MultiHeadDotProductAttention_0/{n}": ("linear", (6, 6), ()) for n in ("query", "key", "value", "out")},
        "MlpBlock_0/Dense_0": ("linear", (6, 11), ()),
        "MlpBlock_0/Dense_1": ("linear", (11, 6), ()),
    },
    "experts": {
        "block/router": ("linear", (6, 4), ()),
        "block/experts/up": ("linear", (6, 5), (4,)),
        "block/experts/down": ("linear", (5, 6), (4,)),
    },
}
SITES["mapped_experts"] = SITES["experts"]
SITES["lm"] = {
    "shared_embedding": ("embed", (13, 6), ()),
    "logits": ("head", (6, 13), ()),
    **{f"decoder/{path}": site for path, site in SITES["encoder"].items()},
}


class Case:
    """A method that reaches all it can of one model; what is compiled is kept."""

    def __init__(self, model: str, name: str):
        self.name, (self.model, self.x, block) = name, MODELS[model]
        self.params, self.sites = found(model)
        self.method = tiny.method(name, sizes="TOY")
        if "targets" in methods.defaults(name):
            around = any(m.on == "block" for m in parts(self.method))
            self.method = tiny.method(name, sizes="TOY", targets=block if around else ".*")
        self.acting = [m for m in parts(self.method) if m.call is not None]

    @property
    def applies(self) -> bool:
        """Is there a target of each part that acts, and a leaf for those that only select?"""
        places = [*self.sites.values(), *self.sites.blocks.values()]
        leaves = [n for path in tree.flatten(self.params) for n in self.sites.names(path)]
        reached = all(any(m.settings(n, p.kind) is not None for p in places for n in p.names) for m in self.acting)
        return reached and (bool(self.acting) or any(self.method.chosen(n, self.sites) for n in leaves))

    @functools.cached_property
    def start(self):
        return toys.start(self.method, self.params, self.sites)

    @functools.cached_property
    def perturbed(self):
        return toys.perturb(self.start.trainable)

    @functools.cached_property
    def out(self):
        """What outputs are weighed with where a number is wanted."""
        shape = jax.eval_shape(lambda p: self.model.apply({"params": p}, self.x), self.params).shape
        return np.random.default_rng(9).standard_normal(shape).astype(np.float32)

    @functools.cached_property
    def run(self):
        """(frozen, trainable) -> (outputs, slopes of their weighed sum): one program."""
        apply = injection.inject(self.model.apply, self.method)

        def weighed(trainable, frozen):
            y = apply({"params": tree.merge(frozen, trainable)}, self.x)
            return jnp.sum(y * self.out), y

        slopes = jax.jit(jax.grad(weighed, has_aux=True))
        return lambda frozen, trainable: slopes(trainable, frozen)[::-1]

    @functools.cached_property
    def ran(self):
        return self.run(self.start.frozen, self.perturbed)


@functools.cache
def found(model):
    """(parameters, sites)."""
    model, x, _ = MODELS[model]
    params = toys.numbers(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    return params, sites.find(model.apply, params, x)


@functools.cache
def plain(model, **settings):
    """params -> outputs, without a method."""
    model, x, _ = MODELS[model]
    model = model.clone(**settings)
    return jax.jit(lambda p: model.apply({"params": p}, x))


@functools.cache
def base(model):
    return plain(model)(found(model)[0])


@pytest.fixture(scope="module", params=[(model, name) for model in MODELS for name in methods.names()], ids="-".join)
def any_case(request):
    return request.param[0], Case(*request.param)


@pytest.fixture
def case(any_case):
    if not any_case[1].applies:
        pytest.skip("no target in this model; the error is another test's")
    return any_case


@pytest.mark.parametrize("model", MODELS)
def test_sites(model):
    assert {p: (s.kind, s.shape, s.stack) for p, s in found(model)[1].items()} == SITES[model]


def test_no_target_is_an_error_that_names_what_there_is(any_case):
    _, case = any_case
    if case.applies:
        return
    names = {s.template.replace("/", ".") for s in (*case.sites.values(), *case.sites.blocks.values())}
    with pytest.raises(ValueError, match=f"^{case.name}: .*({'|'.join(map(re.escape, names))})"):
        case.method.init(jax.random.key(0), case.params, case.sites)


def test_default_targets(any_case):
    """They are found, or the error names modules of this model."""
    _, case = any_case
    method = tiny.method(case.name, sizes="TOY")
    names = {s.template.replace("/", ".") for s in (*case.sites.values(), *case.sites.blocks.values())}
    try:
        trainable = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, case.sites), case.params).trainable
    except ValueError as error:
        assert re.search("|".join(map(re.escape, names)), str(error))
    else:
        assert trainable


@pytest.mark.parametrize(
    "model, name, settings, message",
    [
        ("cnn", "vera", {"targets": ["Conv_0"]}, "Conv_0 is of kind 'conv' and would have to be 'linear'"),
        ("lm", "vera", {"targets": ["logits"]}, "logits is of kind 'head' and would have to be 'linear'"),
        ("lm", "dora", {"targets": ["logits"]}, "logits is of kind 'head' and would have to be 'linear' or 'conv'"),
        ("lm", "ia3", {"targets": ["shared_embedding"]}, "shared_embedding is of kind 'embed'"),
        ("cnn", "ia3", {"targets": ["Conv_0"], "feedforward": ["Conv_0"]}, "'Conv_0' is a convolution.*feedforward"),
        ("mlp", "prompt", {}, "Dense_0 is of kind 'linear' and would have to be 'embed'"),
        ("mlp", "adapter", {}, "match no module; nearest to 'self_attn': .*Dense"),
        ("encoder", "prefix", {}, "match no module; the model has .*MultiHead"),
    ],
)
def test_a_kind_that_a_method_does_not_reach(model, name, settings, message):
    params, all_sites = found(model)
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        methods.make(name, **settings).init(jax.random.key(0), params, all_sites)


def test_identity_at_init(case):
    model, case = case
    promised = re.search(r"^(Not the identity|Identity) at init", methods.module(case.name).__doc__, re.M)
    assert promised
    at_init, _ = case.run(*case.start)
    if promised.group(1) == "Identity":
        toys.close(at_init, base(model), 1e-5 if model == "cnn" else 2e-6)
    else:
        assert float(jnp.abs(at_init - base(model)).max()) > 1e-3


def test_partition(case):
    _, case = case
    frozen, trainable = (tree.flatten(half) for half in case.start)
    kept = tree.flatten(case.params)
    assert trainable and not frozen.keys() & trainable.keys()
    assert kept.keys() <= frozen.keys() | trainable.keys()
    assert bool((frozen.keys() | trainable.keys()) - kept.keys()) == bool(case.acting)
    added = sum(x.size for p, x in trainable.items() if p not in kept)
    counted = sites.count(case.method, case.params, case.sites)
    assert counted == {"trainable": tree.count(case.start.trainable), "total": tree.count(case.params) + added}


def test_what_is_reached(case):
    """All places of the kinds that the method's targets match, and no others."""
    _, case = case
    held = {p.rsplit("/", 2)[0] for p in tree.flatten(tree.merge(*case.start))}
    for part in case.acting:
        places = case.sites.blocks if part.on == "block" else case.sites
        wanted = {path for path, p in places.items() if any(part.settings(n, p.kind) is not None for n in p.names)}
        assert {p.removesuffix(f"/{part.name}") for p in held if p.endswith(f"/{part.name}")} == wanted


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [n for n in methods.names() if "targets" in methods.defaults(n)])
def test_one_target_by_name(model, name):
    """A whole name, as a regex, reaches one place (one layer or expert of it) and trains nothing else."""
    case = Case(model, name)
    if not case.acting:
        pytest.skip(f"{name} trains leaves of the base")
    (part,) = case.acting
    places = case.sites.blocks if part.on == "block" else case.sites
    reached = {n: p for p in places.values() for n in p.names if part.settings(n, p.kind) is not None}
    for wanted in (min(reached), max(reached)):
        method = tiny.method(name, sizes="TOY", targets=re.escape(wanted))
        if part.on == "block" and reached[wanted].stack:
            with pytest.raises(ValueError, match=re.escape(wanted)):  # a block's stack is reached whole
                jax.eval_shape(lambda p, m=method: m.init(jax.random.key(0), p, case.sites), case.params)
            continue
        shapes = jax.eval_shape(lambda p, m=method: m.init(jax.random.key(0), p, case.sites), case.params)
        flat = tree.flatten(shapes.trainable)
        shared = {p: x for p, x in flat.items() if p.startswith(f"{part.name}/")}  # what all sites share
        trained = {p.rsplit(f"/{part.name}/", 1)[0] for p in flat.keys() - shared.keys()}
        assert trained == {reached[wanted].path}
        whole = sites.count(method, case.params, case.sites)["trainable"] - tree.count(shared)
        assert whole * len(reached[wanted].names) == tree.count(shapes.trainable) - tree.count(shared)


def test_fold(case):
    """call(theta) = the plain model with the folded weights, at a perturbed theta."""
    model, case = case
    y, _ = case.ran
    assert float(jnp.abs(y - base(model)).max()) > 1e-2 * float(jnp.abs(base(model)).max())
    if case.method.fold is None:
        return
    folded = toys.fold(case.method, tree.merge(case.start.frozen, case.perturbed), case.sites)
    if model == "lm" and "logits" in folded:  # folding a side of the tie unties it
        apply = plain(model, tied=False)
    else:
        apply = plain(model)
        assert tree.flatten(folded).keys() == tree.flatten(case.params).keys()
    toys.close(y, apply(folded), 1e-5)


def test_every_leaf_gets_a_gradient(case):
    """In every layer and expert."""
    _, case = case
    _, slopes = case.ran
    stacks = {p: s.stack for p, s in (case.sites.blocks | case.sites).items()}
    for path, leaf in tree.flatten(slopes).items():
        holder = max((p for p in stacks if path.startswith(p + "/")), key=len, default=None)
        each = np.asarray(leaf).reshape(*(stacks[holder] if holder else ()), -1)
        size = float(np.abs(tree.flatten(case.perturbed)[path]).max())
        if path.endswith("key/bias"):  # softmax does not see what all keys share
            assert np.abs(each).max() <= 1e-5 * np.abs(case.out).sum() * size
        else:
            assert np.isfinite(each).all() and each.any(-1).all(), path
