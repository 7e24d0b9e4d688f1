"""Starts that move the base leave the residual that Hugging Face PEFT leaves."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch lives in the parity venv")

import peft  # noqa: E402

from peftax.methods import inits  # noqa: E402

pytestmark = pytest.mark.parity
RANK, ALPHA = 4, 6.0


@pytest.fixture(scope="module")
def w():
    """[in, out] with a falling spectrum."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 20)))[0] for n in (20, 32))
    return ((u * np.exp(-np.arange(20) / 6)) @ v.T).astype(np.float32)


@pytest.mark.parametrize(
    "name, theirs, stabilized, tolerance",
    [
        ("pissa", "pissa", False, 1e-5),
        ("pissa", "pissa", True, 1e-5),
        ("pissa_fast", "pissa_niter_16", False, 1e-3),
        ("olora", "olora", False, 1e-5),
        ("orthogonal", "orthogonal", False, 1e-5),
        ("gaussian", "gaussian", False, 1e-5),
        ("kaiming", True, False, 1e-5),
    ],
)
def test_residuals(w, name, theirs, stabilized, tolerance):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 32, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(w.T))
    settings = {"init_lora_weights": theirs, "use_rslora": stabilized}
    layer = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], **settings))
    layer = layer.base_model.model[0]
    expect = layer.base_layer.weight.detach().numpy().T
    product = (layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T).detach().numpy()
    scale = ALPHA / (RANK**0.5 if stabilized else RANK)
    a, b = (np.asarray(x) for x in getattr(inits.module(name), name)(jax.random.key(0), w, RANK, scale))
    assert inits.module(name).MOVES == bool(np.abs(expect - w).max() > 1e-3)
    residual = w - scale * a @ b if inits.module(name).MOVES else w
    np.testing.assert_allclose(residual, expect, atol=tolerance)
    np.testing.assert_allclose(a @ b, product, atol=10 * tolerance)
    if not inits.module(name).MOVES:  # drawn by other generators: the same size
        size = layer.lora_A["default"].weight.detach().numpy().std()
        assert a.std() == pytest.approx(size, rel=0.35)
