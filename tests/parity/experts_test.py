"""LoRA on stacked experts (`target_parameters`) of transformers' Mixtral: PEFT's folders in peftax, and back."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch", reason="torch lives in the parity venv")

import peft  # noqa: E402
from transformers import MixtralConfig, MixtralForCausalLM  # noqa: E402

from peftax import methods  # noqa: E402
from peftax.core import injection, sites, tree  # noqa: E402
from peftax.weights import adapters  # noqa: E402

pytestmark = pytest.mark.parity
E, LAYERS, ROWS = 4, 2, 9
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


class Experts(nn.Module):
    """Mixtral's experts as two stacks of kernels, all of them on all rows."""

    hidden: int
    inner: int

    @nn.compact
    def __call__(self, x, gates):
        each = jnp.broadcast_to(x[None], (E, *x.shape))
        shape = (E, self.hidden, 2 * self.inner)
        both = nn.Einsum(shape, "ECD,EDF->ECF", use_bias=False, name="gate_up_proj")(each)
        gate, up = jnp.split(both, 2, axis=-1)
        shape = (E, self.inner, self.hidden)
        y = nn.Einsum(shape, "ECF,EFD->ECD", use_bias=False, name="down_proj")(nn.silu(gate) * up)
        return jnp.einsum("ce,ecd->cd", gates, y)


class Mlp(nn.Module):
    hidden: int
    inner: int

    @nn.compact
    def __call__(self, x, gates):
        return Experts(self.hidden, self.inner, name="experts")(x, gates)


class Layer(nn.Module):
    hidden: int
    inner: int

    @nn.compact
    def __call__(self, x, gates):
        return x, Mlp(self.hidden, self.inner, name="mlp")(x, gates)


class Layers(nn.Module):
    """What the experts of each layer make of the same rows."""

    hidden: int
    inner: int

    @nn.compact
    def __call__(self, x, gates):
        each = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        scanned = nn.scan(Layer, length=LAYERS, in_axes=nn.broadcast, **each)
        return scanned(self.hidden, self.inner, name="layers")(x, gates)[1]


class Model(nn.Module):
    hidden: int
    inner: int

    @nn.compact
    def __call__(self, x, gates):
        return Layers(self.hidden, self.inner, name="model")(x, gates)


def base(hidden, inner):
    """(a Mixtral, the same experts as our parameters)."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=17,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=E,
    )
    theirs = MixtralForCausalLM(config).eval()
    held = {"gate_up_proj": [], "down_proj": []}
    for layer in theirs.model.layers:
        for name, parameter in layer.mlp.experts.named_parameters():
            torch.nn.init.normal_(parameter, std=0.4)
            held[name].append(parameter.detach().numpy().swapaxes(1, 2))
    params = {name: {"kernel": jnp.asarray(np.stack(v))} for name, v in held.items()}
    return theirs, {"model": {"layers": {"mlp": {"experts": params}}}}


@pytest.fixture
def rows():
    rng = np.random.default_rng(1)
    chosen = np.stack([rng.permutation(E)[:2] for _ in range(ROWS)])
    weights = rng.uniform(0.2, 1, (ROWS, 2)).astype(np.float32)
    gates = np.zeros((ROWS, E), np.float32)
    np.put_along_axis(gates, chosen, weights, 1)
    return chosen, weights, gates


def outputs(theirs, x, rows):
    chosen, weights, _ = (torch.from_numpy(r) for r in rows)
    layers = (theirs.base_model.model if isinstance(theirs, peft.PeftModel) else theirs).model.layers
    with torch.no_grad():
        return np.stack([layer.mlp.experts(torch.from_numpy(x), chosen, weights).numpy() for layer in layers])


def adapted(theirs, turned, **settings):
    """With random values; turned: PEFT takes the second axis for the inputs, as it did before 0.19."""
    settings = {"r": 2, "lora_alpha": 6, "target_modules": [], "target_parameters": TARGETS, **settings}
    layers = list(theirs.model.layers)
    for layer in layers:
        layer.mlp.experts.is_transposed = turned
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for layer in layers:
        layer.mlp.experts.get_base_layer().is_transposed = False
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return theirs.eval()


def close(ours, theirs, plain):
    effect = np.abs(theirs - plain).max()
    assert effect > 0.3
    assert np.abs(ours - theirs).max() <= 1e-5 * max(1, np.abs(theirs).max())


@pytest.mark.parametrize("turned", [False, True], ids=["now", "before 0.19"])
@pytest.mark.parametrize(
    "hidden, inner, settings",
    [
        (8, 12, {"rank_pattern": {"experts.down_proj": 3}}),
        (8, 12, {"target_parameters": ["0.mlp.experts.down_proj", "1.mlp.experts.gate_up_proj"]}),
        (8, 8, {"use_rslora": True}),  # down_proj is square: gate_up_proj tells
        (8, 8, {"target_parameters": ["down_proj"]}),  # the version tells
    ],
)
def test_we_read_what_peft_writes(hidden, inner, settings, turned, rows, tmp_path):
    theirs, params = base(hidden, inner)
    x = np.random.default_rng(2).normal(size=(ROWS, hidden)).astype(np.float32)
    plain = outputs(theirs, x, rows)
    theirs = adapted(theirs, turned, **settings)
    theirs.save_pretrained(tmp_path / "a")
    expect = outputs(theirs, x, rows)
    if turned:
        file = tmp_path / "a" / adapters.PEFT_CONFIG
        config = json.loads(file.read_text())
        del config["peft_version"]
        file.write_text(json.dumps(config))

    model = Model(hidden, inner)
    np.testing.assert_allclose(model.apply({"params": params}, x, rows[-1]), plain, atol=1e-5)
    found = sites.find(model.apply, params, x, rows[-1])
    method, part, raw = adapters.load(tmp_path / "a", params, found)
    run = injection.inject(model.apply, method)
    close(run({"params": tree.merge(*part)}, x, rows[-1]), expect, plain)
    trained = sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
    assert sites.count(method, params, found)["trainable"] == trained

    adapters.save(tmp_path / "b", part, method, found, extra=raw)  # as PEFT writes it now
    mine, file = (load_file(tmp_path / f / adapters.TENSORS) for f in "ba")
    assert mine.keys() == file.keys()
    if not turned:
        for key, value in file.items():
            np.testing.assert_array_equal(mine[key], value)


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": [], "parameters": TARGETS, "rank_pattern": {"experts.down_proj": 3}},
        {"targets": "all-linear", "rank_pattern": {r"down_proj\.\d+": 3}, "alpha_pattern": {r"up_proj\.\d": 5.0}},
        {"targets": r".*gate_up.*", "dropout": 0.1},
    ],
)
def test_peft_reads_what_we_write(settings, rows, tmp_path):
    theirs, params = base(8, 12)
    x = np.random.default_rng(2).normal(size=(ROWS, 8)).astype(np.float32)
    plain = outputs(theirs, x, rows)
    model = Model(8, 12)
    found = sites.find(model.apply, params, x, rows[-1])
    method = methods.make("lora", **{"rank": 2, "alpha": 6.0, **settings})
    part = method.init(jax.random.key(0), params, found)
    rng = np.random.default_rng(3)
    noisy = jax.tree.map(lambda v: v + 0.5 * rng.standard_normal(v.shape).astype("f"), part.trainable)
    part = part._replace(trainable=noisy)
    adapters.save(tmp_path / "a", part, method, found)
    ours = injection.inject(model.apply, method)({"params": tree.merge(*part)}, x, rows[-1])
    close(ours, outputs(peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval(), x, rows), plain)
    again, part_again, _ = adapters.load(tmp_path / "a", params, found)
    jax.tree.map(np.testing.assert_array_equal, part.trainable, part_again.trainable)
