"""OFT, BOFT and HRA with settings that no golden adapter has: PEFT's live layers and ours from the same folder."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peftax import models, weights
from peftax.core import injection, sites, tree
from peftax.weights import adapters

torch = pytest.importorskip("torch", reason="torch lives in the parity venv")
pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).parent.parent / "weights" / "golden"
TARGETS = ["q_proj", "v_proj", "down_proj"]


class Base:
    def __init__(self, folder):
        source = weights.open(GOLDEN / "base_model.safetensors")
        self.model = models.build(source.config, scan=True)
        shapes = models.abstract(self.model)
        self.params = weights.load(source, shapes)
        self.folder = weights.save(self.params, source.config, folder)
        self.sites = sites.find(self.model.apply, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32))
        self.ids = np.load(GOLDEN / "input_ids.npy").astype(np.int32)

    def torch(self):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def ours(self, method, frozen, trainable):
        return injection.inject(self.model.apply, method)({"params": tree.merge(frozen, trainable)}, self.ids)

    def plain(self):
        return np.asarray(self.model.apply({"params": self.params}, self.ids))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Base(tmp_path_factory.mktemp("b") / "base")


def theirs(base, config, size=0.1):
    """PEFT's model with noise on what it trains."""
    from peft import get_peft_model

    model = get_peft_model(base.torch(), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += size * torch.randn_like(value)
    return model


def check(base, model, folder):
    """Their folder here, and ours there: the same logits; returns what was read."""
    from peft import PeftModel

    with torch.no_grad():
        expect = model.eval()(torch.from_numpy(base.ids).long()).logits.numpy()
    model.save_pretrained(folder / "theirs")
    method, part, raw = adapters.load(folder / "theirs", base.params, base.sites)
    effect = np.abs(expect - base.plain()).max()
    assert effect > 0.02
    assert np.abs(np.asarray(base.ours(method, *part)) - expect).max() <= 1e-5 + 1e-3 * effect
    adapters.save(folder / "ours", part, method, base.sites, base=str(base.folder))
    again = PeftModel.from_pretrained(base.torch(), folder / "ours").eval()
    with torch.no_grad():
        back = again(torch.from_numpy(base.ids).long()).logits.numpy()
    assert np.abs(back - expect).max() <= 1e-5 + 1e-3 * effect
    kept = json.loads((folder / "ours" / adapters.PEFT_CONFIG).read_text())
    assert {
        k: raw[k] for k in raw.keys() & kept.keys() if k.startswith(("oft", "boft", "use", "num", "block"))
    }.items() <= (kept.items())
    return method, part


@pytest.mark.parametrize(
    "settings",
    [
        {"oft_block_size": 0, "r": 4},
        {"oft_block_size": 40},  # divides neither 64 nor 96
        {"oft_block_size": 8, "num_cayley_neumann_terms": 2},
        {"oft_block_size": 8, "num_cayley_neumann_terms": 3},
        {"oft_block_size": 8, "num_cayley_neumann_terms": 4},
        {"oft_block_size": 8, "num_cayley_neumann_terms": 7},
        {"oft_block_size": 8, "coft": True, "eps": 1.0},
        {"oft_block_size": 8, "coft": True, "eps": 0.1, "block_share": True, "use_cayley_neumann": False},
        {"oft_block_size": 8, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ],
    ids=str,
)
def test_oft(base, settings, tmp_path):
    from peft import OFTConfig

    config = OFTConfig(**{"target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings})
    check(base, theirs(base, config), tmp_path)


def test_constrained_steps(base, tmp_path):
    """Three steps of SGD on the mean of some logits: PEFT projects before each forward pass, we after each step."""
    from peft import OFTConfig

    config = OFTConfig(oft_block_size=8, coft=True, eps=0.5, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = theirs(base, config)
    model.save_pretrained(tmp_path / "a")
    method, part, _ = adapters.load(tmp_path / "a", base.params, base.sites)
    which = np.random.default_rng(0).standard_normal(base.plain().shape).astype(np.float32) / 100

    theta = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(theta, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.from_numpy(base.ids).long()).logits * torch.from_numpy(which)).sum().backward()
        optimizer.step()
    with torch.no_grad():
        expect = model(torch.from_numpy(base.ids).long()).logits.numpy()  # and the last projection

    @jax.jit
    @jax.grad
    def gradient(trainable):
        return jnp.sum(base.ours(method, part.frozen, trainable) * which)

    ours = method.wrap(optax.sgd(0.05), 3, base.sites)
    trainable, state = part.trainable, ours.init(part.trainable)
    start = np.asarray(base.ours(method, part.frozen, trainable))
    for _ in range(3):
        updates, state = ours.update(gradient(trainable), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    moved = np.abs(expect - start).max()
    assert moved > 0.005
    assert np.abs(np.asarray(base.ours(method, part.frozen, trainable)) - expect).max() <= 1e-5 + 1e-3 * moved
    held = {f"base_model.model.{n}.oft_R.weight": v for n, v in _oft(trainable).items()}
    found = dict(model.state_dict())
    for name, value in held.items():
        np.testing.assert_allclose(value, found[name.replace("oft_R.", "oft_R.default.")].numpy(), atol=1e-6)


def _oft(trainable):
    """{module name: one layer's numbers as in the file}."""
    return {
        path.replace("layers/", f"layers/{i}/").removesuffix("/oft/default/r").replace("/", "."): np.asarray(x[i]).T
        for path, x in tree.flatten(trainable).items()
        for i in range(len(x))
    }


class BlockDiagonals:
    """What PEFT's CUDA extension computes, in torch: [N, D, H, H] -> [N, D H, D H]."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*each) for each in blocks])]

    @staticmethod
    def backward(slopes, blocks):
        n = blocks.shape[-1]
        return [torch.stack([slopes[:, i * n : (i + 1) * n, i * n : (i + 1) * n] for i in range(blocks.shape[1])], 1)]


@pytest.mark.parametrize(
    "settings",
    [
        {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
        {"boft_block_size": 4, "boft_n_butterfly_factor": 4},
        {"boft_block_size": 0, "boft_block_num": 8, "boft_n_butterfly_factor": 3},
    ],
    ids=str,
)
def test_boft_butterflies(base, settings, tmp_path, monkeypatch):
    """On CPU PEFT takes one factor; with its extension's place taken it takes them all."""
    from peft import BOFTConfig
    from peft.tuners.boft import layer

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: BlockDiagonals)
    config = BOFTConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **settings)
    model = theirs(base, config)
    method, part = check(base, model, tmp_path)
    which = np.random.default_rng(0).standard_normal(base.plain().shape).astype(np.float32)
    (model(torch.from_numpy(base.ids).long()).logits * torch.from_numpy(which)).sum().backward()
    slopes = jax.jit(jax.grad(lambda t: jnp.sum(base.ours(method, part.frozen, t) * which)))(part.trainable)
    slopes = tree.flatten(slopes)["model/layers/self_attn/q_proj/boft/default/r"]
    for i in range(2):
        expect = model.base_model.model.model.layers[i].self_attn.q_proj.boft_R["default"].grad.numpy()
        np.testing.assert_allclose(slopes[i], expect, atol=1e-4 * np.abs(expect).max())


@pytest.mark.parametrize("settings", [{"r": 3}, {"r": 6}, {"r": 5, "apply_GS": True}], ids=str)
def test_hra(base, settings, tmp_path):
    from peft import HRAConfig

    config = HRAConfig(target_modules=[*TARGETS, "lm_head"], task_type="CAUSAL_LM", **settings)
    check(base, theirs(base, config), tmp_path)
