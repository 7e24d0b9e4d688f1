"""EVA's directions and ranks on a tiny Llama are those of Hugging Face PEFT's incremental SVD."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: run with .venv-parity")

import peft  # noqa: E402
from peft.tuners.lora import EvaConfig  # noqa: E402

from peftax import models, weights  # noqa: E402
from peftax.core import injection, sites  # noqa: E402
from peftax.methods import lora  # noqa: E402
from peftax.methods.inits import eva  # noqa: E402
from tests.parity.tiny import T, base  # noqa: E402

pytestmark = pytest.mark.parity
TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]  # none shares what it is given with another
RANK, ROWS = 4, 40


def tokens():
    rng = np.random.default_rng(3)
    ids = rng.choice(61, (ROWS, T), p=rng.dirichlet(np.full(61, 0.3))).astype(np.int32)
    return ids, (np.arange(T)[None] < rng.integers(5, T + 1, (ROWS, 1)))


@pytest.mark.parametrize("rho, whiten", [(2.0, False), (1.0, True)])
def test_same_directions_and_ranks(tmp_path, rho, whiten):
    ids, held = tokens()
    reference = base(tmp_path, hidden_size=24, intermediate_size=41, head_dim=10)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=8,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho, tau=0.999, whiten=whiten, use_label_mask=False),
    )
    model = peft.get_peft_model(reference, config, low_cpu_mem_usage=True)
    batch = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(held).long()}
    peft.initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
    their_config = model.peft_config["default"]
    theirs = {
        n.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): p.detach().numpy().T
        for n, p in model.named_parameters()
        if ".lora_A." in n
    }

    source = weights.open(tmp_path)
    own = models.build(source.config)
    params = weights.load(source, models.abstract(own))
    found_sites = sites.find(own.apply, params, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    method = lora.lora(rank=RANK, alpha=8.0, targets=TARGETS, init="eva")

    def run(apply, params, batch):
        positions = jnp.broadcast_to(jnp.arange(T)[None], batch["ids"].shape)
        return apply({"params": params}, batch["ids"], positions, batch["held"]).sum()

    found = eva.calibrate(
        run,
        functools.partial(injection.inject, own.apply),
        method,
        params,
        found_sites,
        [({"ids": ids, "held": held.astype(np.int32)}, held)],
        rho=rho,
        whiten=whiten,
    )
    assert {n: r for n, r in found.ranks.items() if r} == {n: a.shape[1] for n, a in theirs.items()}
    if rho > 1:
        assert len(set(found.ranks.values())) > 2
    settings = found.settings(method)
    assert settings["rank_pattern"] == (their_config.rank_pattern or {})
    assert settings["alpha_pattern"] == pytest.approx(their_config.alpha_pattern or {})
    for name, a in theirs.items():
        ours = found.a[name]
        twice = 2**0.25 if whiten else 1  # PEFT looks at the batch a second time to see that nothing moves
        size, expected = np.linalg.norm(ours, axis=0), twice * np.linalg.norm(a, axis=0)
        np.testing.assert_allclose(size, expected, rtol=2e-2, err_msg=name)
        u, v = (np.linalg.qr(x)[0] for x in (ours, a))
        angles = np.linalg.svd(u.T @ v, compute_uv=False)
        assert angles.min() > (0.99 if rho > 1 else 0.95), (name, angles)  # with rho 1 PEFT sees through 8 directions

    adapted = lora.lora(**settings)
    part = eva.fill(adapted.init(jax.random.key(0), params, found_sites), found, found_sites)
    for name, (site, layer) in found_sites.by_name().items():
        if name in theirs:
            leaves = part.trainable
            for key in site.path.split("/"):
                leaves = leaves[key]
            a = np.asarray(leaves["lora"]["default"]["a"][layer])
            np.testing.assert_array_equal(a[:, : theirs[name].shape[1]], found.a[name])
            assert not a[:, theirs[name].shape[1] :].any()
