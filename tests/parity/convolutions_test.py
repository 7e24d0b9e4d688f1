"""Convolutions' adapters: folders that Hugging Face PEFT writes, read here and written again, and what gets no file."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch", reason="torch lives in the parity venv")

import peft  # noqa: E402

from peftax import methods  # noqa: E402
from peftax.core import injection, sites, tree  # noqa: E402
from peftax.core.hf import Unsupported  # noqa: E402
from peftax.weights import adapters  # noqa: E402

pytestmark = pytest.mark.parity
TARGETS = ["first", "last"]


def strides(window):
    """One for both sides where the window is square: PEFT's HRA knows no others."""
    return tuple(max(1, n - 1) for n in window)


class Cnn(nn.Module):
    window: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, self.window, strides=strides(self.window), padding="VALID", name="first")(x))
        return nn.Dense(4, name="last")(x.mean(tuple(range(1, x.ndim - 1))))


class TorchCnn(torch.nn.Module):
    def __init__(self, window):
        super().__init__()
        kind = getattr(torch.nn, f"Conv{len(window)}d")
        self.first = kind(3, 5, window, stride=strides(window))
        self.last = torch.nn.Linear(5, 4)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)).mean(tuple(range(2, x.ndim))))


def nets(window):
    """(torch's, ours, its parameters, x channels last)."""
    torch.manual_seed(0)
    theirs = TorchCnn(window)
    held = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    params = {
        "first": {"kernel": np.moveaxis(held["first.weight"], (0, 1), (-1, -2)), "bias": held["first.bias"]},
        "last": {"kernel": held["last.weight"].T, "bias": held["last.bias"]},
    }
    x = np.random.default_rng(0).normal(size=(2, *(7, 6, 5)[: len(window)], 3)).astype(np.float32)
    return theirs, Cnn(window), jax.tree.map(jnp.asarray, params), x


ADALORA = {"init_r": 3, "target_r": 2, "total_step": 9}
IA3 = {"feedforward_modules": ["last"]}


@pytest.mark.parametrize(
    "kind, window, settings",
    [
        ("Lora", (3, 2), {}),
        ("Lora", (3, 2), {"lora_bias": True}),
        ("Lora", (3,), {}),
        ("Lora", (3, 2), {"use_dora": True}),
        ("AdaLora", (3, 2), ADALORA),
        ("HRA", (3, 3), {"r": 3}),
        ("Hira", (3, 2), {}),
        ("Hira", (1, 2, 3), {}),
        ("IA3", (3, 2), IA3),
        ("IA3", (3, 2, 2), IA3),
        ("LoHa", (3, 2), {"alpha": 3}),
        ("LoHa", (2,), {"alpha": 3}),
    ],
    ids=str,
)
def test_there_and_back(tmp_path, kind, window, settings):
    theirs, model, params, x = nets(window)
    ranks = {} if kind in ("AdaLora", "HRA", "IA3") else {"r": 2}
    config = getattr(peft, f"{kind}Config")(target_modules=TARGETS, **ranks, **settings)
    theirs = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p += 0.5 * torch.randn_like(p)
        expect = theirs.eval()(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
    theirs.save_pretrained(tmp_path / "a")
    found = sites.find(model.apply, params, x)
    method, part, raw = adapters.load(tmp_path / "a", params, found)
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sites.count(method, params, found)["trainable"] == count
    assert np.abs(expect - model.apply({"params": params}, x)).max() > 0.05
    ours = injection.inject(model.apply, method)({"params": tree.merge(*part)}, x)
    close = 1e-5 * max(1, np.abs(expect).max())
    np.testing.assert_allclose(ours, expect, atol=close)
    np.testing.assert_allclose(model.apply({"params": method.fold(tree.merge(*part), found)}, x), expect, atol=close)
    adapters.save(tmp_path / "b", part, method, found, extra=raw)
    mine, file = (load_file(tmp_path / f / adapters.TENSORS) for f in "ba")
    assert mine.keys() == file.keys()
    for key in mine:
        np.testing.assert_array_equal(mine[key], file[key])


@pytest.mark.parametrize(
    "name, window",
    [("boft", (3, 2)), ("oft", (3, 2)), ("hra", (3, 2)), ("adalora", (3,)), ("ia3", (3,)), ("loha", (1, 2, 3))],
)
def test_what_peft_has_no_form_for_is_not_written(tmp_path, name, window):
    _, model, params, x = nets(window)
    found = sites.find(model.apply, params, x)
    more = {"boft": {"block_size": 2}, "oft": {"block_size": 3}, "ia3": {"feedforward": ()}}
    method = methods.make(name, targets=["first"], **more.get(name, {}))
    part = method.init(jax.random.key(0), params, found)
    with pytest.raises(Unsupported, match=f"first/{name}/.*: {name.upper()} has no file form here for a conv site"):
        adapters.save(tmp_path / "a", part, method, found)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "kind, message", [("LoHa", "use_effective_conv2d.*third factor"), ("LoKr", "no place in this")]
)
def test_what_is_not_expressed_here_is_not_read(tmp_path, kind, message):
    theirs, model, params, x = nets((3, 2))
    config = getattr(peft, f"{kind}Config")(r=2, target_modules=TARGETS, use_effective_conv2d=True)
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        adapters.load(tmp_path / "a", params, sites.find(model.apply, params, x))
