import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from peftax import weights
from peftax.weights import source

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(6, dtype=np.int64).reshape(2, 3),
    "c": np.array(3.0, np.float32),
}


def lay(folder, tensors=TENSORS, config=True):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def lay_shards(folder):
    folder.mkdir()
    files = {}
    for i, (name, value) in enumerate(TENSORS.items()):
        files[name] = f"part{i}.safetensors"
        save_file({name: value}, folder / files[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def same(found):
    assert sorted(found.names()) == sorted(TENSORS)
    for name, value in TENSORS.items():
        assert found.shape(name) == value.shape and found.dtype(name) == value.dtype
        np.testing.assert_array_equal(found.read(name), value)


def test_folder(tmp_path):
    found = weights.open(lay(tmp_path / "m"))
    same(found)
    assert found.config["model_type"] == "llama"
    assert found.tokenizer() is None


def test_shards(tmp_path):
    same(weights.open(lay_shards(tmp_path / "m")))


def test_an_old_index_beside_one_file(tmp_path):
    """What save_pretrained leaves of shards where it then writes one file; transformers reads that."""
    lay(lay_shards(tmp_path / "m"), {name: np.array(value + 1) for name, value in TENSORS.items()})
    found = weights.open(tmp_path / "m")
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(found.read(name), value + 1)


def test_file(tmp_path):
    lay(tmp_path / "m", config=False)
    found = weights.open(tmp_path / "m" / "model.safetensors")
    same(found)
    assert found.config == {}


def test_slices(tmp_path):
    found = weights.open(lay(tmp_path / "m"))
    part = found.read("a.weight", index=(slice(1, 3), slice(0, 2)))
    np.testing.assert_array_equal(part, TENSORS["a.weight"][1:3, :2])


def test_bfloat16(tmp_path):
    import jax.numpy as jnp

    lay(tmp_path / "m", {"a": np.asarray(jnp.arange(6, dtype=jnp.bfloat16))})
    found = weights.open(tmp_path / "m")
    assert found.dtype("a") == found.read("a", index=(slice(1, 3),)).dtype == jnp.bfloat16


def lay_cache(cache, repo="org/tiny", **revisions):
    """The hub's own cache layout: refs name commits, snapshots link to blobs."""
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    for number, (ref, tensors) in enumerate(revisions.items()):
        commit = f"{number + 1:040x}"
        (home / "refs" / ref).write_text(commit)
        snapshot = home / "snapshots" / commit
        lay(home / "blobs" / commit, tensors)
        snapshot.mkdir(parents=True)
        for file in (home / "blobs" / commit).iterdir():
            (snapshot / file.name).symlink_to(file)
    return cache


@pytest.fixture
def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_hub_cache(tmp_path, offline):
    cache = lay_cache(tmp_path, main=TENSORS, other={"a.weight": np.ones((1, 1), np.float32)})
    same(weights.open("org/tiny", cache_dir=cache))
    other = weights.open("org/tiny", revision="other", cache_dir=cache)
    assert other.shape("a.weight") == (1, 1)
    by_commit = weights.open("org/tiny", revision=f"{2:040x}", cache_dir=cache)
    assert by_commit.shape("a.weight") == (1, 1)


def test_hub_without_network_falls_back_to_the_cache(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    real, asked = huggingface_hub.snapshot_download, []

    def no_network(*args, local_files_only=False, **kwargs):
        asked.append(local_files_only)
        if not local_files_only:
            raise ConnectionError("no route")
        return real(*args, local_files_only=True, **kwargs)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    same(weights.open("org/tiny", cache_dir=lay_cache(tmp_path, main=TENSORS)))
    assert asked == [False, True]


@pytest.mark.parametrize("revision", [None, "gone"])
def test_hub_has_it_not(tmp_path, offline, revision):
    where = "org/absent" if revision is None else "org/tiny"
    lay_cache(tmp_path, main=TENSORS)
    with pytest.raises(FileNotFoundError, match=f"{where}.*nor in its cache") as error:
        weights.open(where, revision=revision, cache_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_no_path_and_no_hub_id(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        weights.open(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        weights.open("models/absent.gguf")


def test_revision_of_a_path(tmp_path):
    with pytest.raises(ValueError, match="has no revision"):
        weights.open(lay(tmp_path / "m"), revision="main")


def test_pickle_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="pytorch_model.bin, a pickle.*save_pretrained"):
        weights.open(tmp_path)


def test_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        weights.open(tmp_path)


def test_truncated(tmp_path):
    file = lay(tmp_path / "m") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="model.safetensors: truncated"):
        weights.open(tmp_path / "m")


def test_missing_shard(tmp_path):
    folder = lay_shards(tmp_path / "m")
    (folder / "part1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="part1.safetensors.*missing"):
        weights.open(folder)


def test_tensor_is_not_in_its_shard(tmp_path):
    folder = lay_shards(tmp_path / "m")
    save_file({"z": np.zeros(1, np.float32)}, folder / "part0.safetensors")
    with pytest.raises(ValueError, match="part0.safetensors: tensor 'a.weight'"):
        weights.open(folder).read("a.weight")


def test_missing_tensor_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="no tensor 'a.wieght'; nearest: 'a.weight'"):
        weights.open(lay(tmp_path / "m")).read("a.wieght")


def test_missing_config(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json: missing"):
        _ = weights.open(lay(tmp_path / "m", config=False)).config


def test_is_a_source(tmp_path):
    assert isinstance(weights.open(lay(tmp_path / "m")), source.Safetensors)
