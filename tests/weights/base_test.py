import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from peftax import models, weights
from peftax.core import tree as trees
from peftax.weights import headed, names

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def shapes(scan, **config):
    return models.abstract(models.build(CONFIG | config, scan=scan))


def random(abstract, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), dtype=x.dtype), abstract)


def mesh():
    return jax.make_mesh((8,), ("fsdp",))


def sharded(abstract):
    """Each leaf cut over its largest axis that 8 devices divide; replicated where there is none."""

    def place(x):
        for axis in sorted(range(len(x.shape)), key=lambda a: -x.shape[a]):
            if x.shape[axis] % 8 == 0:
                return NamedSharding(mesh(), PartitionSpec(*[None] * axis, "fsdp"))
        return NamedSharding(mesh(), PartitionSpec())

    return jax.tree.map(place, abstract)


def same(a, b):
    a, b = trees.flatten(a), trees.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


@pytest.fixture
def saved(tmp_path):
    params = random(shapes(scan=True))
    return params, weights.save(params, CONFIG, tmp_path / "base")


def test_round_trip(saved):
    params, folder = saved
    same(weights.load(folder, shapes(scan=True)), params)


def test_unrolled_and_scanned_are_one_checkpoint(saved, tmp_path):
    params, folder = saved
    unrolled = weights.load(folder, shapes(scan=False))
    kernel = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(unrolled["model"]["layers"]["2"]["mlp"]["up_proj"]["kernel"], kernel[2])
    again = weights.save(unrolled, CONFIG, tmp_path / "again")
    first, second = (load_file(f / "model.safetensors") for f in (folder, again))
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert weights.fingerprint(unrolled) == weights.fingerprint(params)


@pytest.mark.parametrize("scan", [True, False])
def test_onto_shards(saved, tmp_path, scan):
    _, folder = saved
    abstract = shapes(scan)
    places = sharded(abstract)
    here = weights.load(folder, abstract)
    there = weights.load(folder, abstract, shardings=places)
    same(there, here)
    for path, x in trees.flatten(there).items():
        assert x.sharding == trees.flatten(places)[path]
    assert weights.fingerprint(there) == weights.fingerprint(here)
    weights.save(there, CONFIG, tmp_path / "again")
    same(weights.load(tmp_path / "again", abstract), here)


def test_layer_axis_on_shards(saved):
    """Four layers over two devices, every shard made of two layers' tensors."""
    params, folder = saved
    abstract = shapes(scan=True)
    two = jax.make_mesh((2, 4), ("layer", "fsdp"))

    def place(path, x):
        parts = ("layer",) if names.is_stacked(path) else ()
        return NamedSharding(two, PartitionSpec(*parts))

    flat = trees.flatten(abstract)
    places = trees.unflatten({path: place(path, x) for path, x in flat.items()})
    same(weights.load(folder, abstract, shardings=places), params)


def test_only_the_shards_are_read(saved, monkeypatch):
    _, folder = saved
    abstract, found, read = shapes(scan=True), weights.open(folder), []
    real = found.read

    def watched(name, *, index=None):
        part = real(name, index=index)
        read.append((name, part.shape))
        return part

    monkeypatch.setattr(found, "read", watched)
    weights.load(found, abstract, shardings=sharded(abstract))
    cut = [shape for name, shape in read if name == "model.layers.0.mlp.up_proj.weight"]
    assert cut == [(5, 16)] * 8  # [out, in] in the file; 40 outputs over 8 devices
    read.clear()
    whole = jax.tree.map(lambda x: NamedSharding(mesh(), PartitionSpec()), abstract)
    weights.load(found, abstract, shardings=whole)
    assert sorted(name for name, _ in read) == sorted(found.names())  # once, not once per device


def test_file_layout(saved):
    params, folder = saved
    with safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        stored = file.get_tensor("model.layers.1.self_attn.q_proj.weight")
    kernel = params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(stored, kernel[1].T)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 2}
    modes = {file.stat().st_mode for file in folder.iterdir()}
    assert len(modes) == 1, "one file has other permissions"


def test_sharded_index(saved, tmp_path):
    params, _ = saved
    folder = weights.save(params, CONFIG, tmp_path / "cut", max_shard_bytes=8_000)
    files = sorted(folder.glob("model-*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and {f.name for f in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == trees.nbytes(params)
    for file in files:
        assert sum(x.nbytes for x in load_file(file).values()) <= 8_000
    same(weights.load(folder, shapes(scan=True)), params)


def test_dtypes(saved, tmp_path):
    params, _ = saved
    folder = weights.save(params, CONFIG, tmp_path / "half", dtype="bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    found = weights.open(folder)
    assert found.dtype("model.norm.weight") == jnp.bfloat16
    half = weights.load(found, shapes(scan=True), dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params)
    same(weights.load(found, shapes(scan=True)), rounded)


def test_other_kinds_of_layers(tmp_path):
    rng = np.random.default_rng(0)
    params = {
        "patch": {"kernel": jnp.asarray(rng.standard_normal((2, 3, 4, 5))), "bias": jnp.ones(5)},
        "norm": {"scale": jnp.ones(5), "bias": jnp.zeros(5)},
        "cls_token": jnp.ones((1, 1, 5)),
        "position_ids": jnp.arange(5),
    }
    folder = weights.save(params, {"model_type": "vit"}, tmp_path / "vit")
    stored = load_file(folder / "model.safetensors")
    assert stored["patch.weight"].shape == (5, 4, 2, 3)
    assert stored["norm.weight"].shape == (5,)
    assert "architectures" not in json.loads((folder / "config.json").read_text())
    same(weights.load(folder, trees.abstract(params)), params)


def test_untied_head_is_said(tmp_path):
    params = random(shapes(scan=True))
    folder = weights.save(params, CONFIG | {"tie_word_embeddings": True}, tmp_path / "m")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_never_half_written(saved, tmp_path, monkeypatch):
    params, folder = saved
    with pytest.raises(FileExistsError, match="base: exists"):
        weights.save(params, CONFIG, folder)

    class Broken:
        eos_token_id = 2

        def save_pretrained(self, where):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        weights.save(params, CONFIG, tmp_path / "new", tokenizer=Broken())
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_missing_tensor(saved):
    _, folder = saved
    rewrite(folder, lambda t: t.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"base: .*'model.layers.3.mlp.up_proj.weight'; nearest"):
        weights.load(folder, shapes(scan=True))


def test_wrong_shape(saved):
    _, folder = saved
    with pytest.raises(ValueError, match=r"'model.*' has shape \(16, 40\).*needs \(16, 48\)"):
        weights.load(folder, shapes(scan=True, intermediate_size=48))


def test_quantized_checkpoint_is_refused(saved):
    _, folder = saved
    config = CONFIG | {"quantization_config": {"quant_method": "hqq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized by hqq, which is not read; read are bitsandbytes, gptq"):
        weights.load(folder, shapes(scan=True))


def test_unused_tensors_are_named(saved, monkeypatch):
    _, folder = saved
    said = []
    monkeypatch.setattr("absl.logging.warning", lambda text, *args, **kwargs: said.append(text % args))

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    rewrite(folder, add)
    weights.load(folder, shapes(scan=True))
    assert said == []
    rewrite(folder, lambda t: t.update({f"extra.{i}": np.ones(1, np.float32) for i in range(5)}))
    weights.load(folder, shapes(scan=True))
    (only,) = said
    assert "extra.0, extra.1, extra.2 and 2 more" in only

    rewrite(folder, lambda t: [t.pop(f"extra.{i}") for i in range(5)])
    tied = shapes(scan=True, tie_word_embeddings=True)
    weights.load(folder, tied)
    assert len(said) == 2 and "lm_head.weight" in said[1]
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    weights.load(folder, tied)
    assert len(said) == 2


def test_a_head_that_is_tied_and_another_is_not_lost(saved, monkeypatch):
    """transformers does not tie two tables that differ, whatever config.json says."""
    _, folder = saved
    monkeypatch.setattr("peftax.weights.base.SLAB", 256)  # 4 rows
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    tied, last = shapes(scan=True, tie_word_embeddings=True), np.arange(24)[:, None] == 23
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + last.astype("f")}))
    with pytest.raises(ValueError, match="'lm_head.weight' is another table than 'model.embed_tokens.weight'.*false"):
        weights.load(folder, tied)
    classifier = models.abstract(models.build(CONFIG | {"tie_word_embeddings": True}, labels=2))
    opened = headed.Headed(weights.open(folder))
    opened.fit(classifier)
    weights.check(opened, classifier)  # has no use for it


def test_shardings_of_another_tree(saved):
    _, folder = saved
    places = sharded(shapes(scan=False))
    with pytest.raises(ValueError, match="shardings and parameters differ"):
        weights.load(folder, shapes(scan=True), shardings=places)


def test_fingerprint_sees_every_number(saved):
    params, _ = saved
    first = weights.fingerprint(params)
    assert first == weights.fingerprint(jax.tree.map(np.asarray, params))
    seen = {first, weights.fingerprint(jax.tree.map(lambda x: x.astype("bfloat16"), params))}
    flat = trees.flatten(params)
    for path, x in flat.items():
        last = (-1,) * x.ndim
        seen.add(weights.fingerprint(trees.unflatten(flat | {path: x.at[last].add(1.0)})))
    kernel = "model/layers/mlp/up_proj/kernel"
    swapped = flat | {kernel: flat[kernel][::-1]}
    seen.add(weights.fingerprint(trees.unflatten(swapped)))
    assert len(seen) == len(flat) + 3
