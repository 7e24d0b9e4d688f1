"""Recipes: overrides apply left to right, a method brings its own keys, a typo is an error."""

import importlib
import json
import os
import re
from pathlib import Path

import pytest

from peftax import methods, recipe


@pytest.mark.parametrize("name", ["default", *recipe.shipped()])
def test_every_recipe_loads_and_its_method_builds(name):
    config = recipe.load(name).to_dict()
    json.dumps(config)
    methods.make(**config["method"])


def test_choosing_a_method_installs_its_defaults_alone():
    config = recipe.load("smollm2_lora", [("method.rank", "8"), ("method.name", "bitfit")])
    assert config.method.to_dict() == {"name": "bitfit", **methods.defaults("bitfit")}


def test_a_chain_has_each_methods_settings_under_its_name():
    mam = str(Path(__file__).parent.parent / "configs" / "smollm2_mam.py")
    config = recipe.load(mam, [("method.prefix.length", "4"), ("method.adapter.size", "8")])
    assert (config.method.prefix.length, config.method.adapter.size) == (4, 8)
    assert config.method.adapter.placement == "scaled_parallel"
    assert config.method.adapter.scale is None and "name" not in config.method.adapter
    config = recipe.load("smollm2_lora", [("method.name", "prompt+bitfit")])
    assert config.method.to_dict() == {"name": "prompt+bitfit", **methods.defaults("prompt+bitfit")}
    with pytest.raises(KeyError, match="nearest: 'method.prefix.length'"):
        recipe.load(mam, [("method.prefix.lenght", "4")])


def test_overrides_apply_left_to_right():
    config = recipe.load("smollm2_lora", [("method.name", "lora"), ("method.rank", "4"), ("method.rank", "2")])
    assert (config.method.rank, config.method.alpha) == (2, methods.defaults("lora")["alpha"])


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.clip", "None", None),
        ("data.train_limit", "7", 7),
        ("method.targets", "['q_proj','v_proj']", ("q_proj", "v_proj")),
        ("method.targets", r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("method.rank_pattern", "{'layers.1.*v_proj': 2}", (("layers.1.*v_proj", 2),)),
        ("train.tensorboard", "false", False),
        ("model.path", "8", "8"),
        ("model.remat", "none", "none"),
    ],
)
def test_values(key, text, value):
    config = recipe.load("default", [(key, text)])
    assert recipe.flat(config)[key] == value


@pytest.mark.parametrize(
    ("key", "text", "error", "message"),
    [
        ("method.rnk", "8", KeyError, "nearest: 'method.rank'"),
        ("train.step", "8", KeyError, "nearest: 'train.steps'"),
        ("train.steps", "many", ValueError, "train.steps='many': want a value like 100"),
        ("train.steps", "1.5", ValueError, "want a value like"),
        ("train.tensorboard", "3", ValueError, "want a value like True"),
        ("optimizer.no_decay", "('/b$')", ValueError, "want several in brackets, a comma behind each: ('/b$',)"),
        ("method.name", "lorra", ValueError, "nearest: 'lora'"),
    ],
)
def test_typos_name_the_nearest(key, text, error, message):
    with pytest.raises(error, match=re.escape(message)):
        recipe.load("default", [(key, text)])


def test_unknown_recipe_and_a_file(tmp_path):
    with pytest.raises(ValueError, match="no recipe 'smollm'; shipped: .*smollm2_lora"):
        recipe.load("smollm")
    file = tmp_path / "mine.py"
    file.write_text(
        "from peftax.configs import default\n\ndef get_config():\n    c = default.get_config()\n"
        "    c.train.steps = 3\n    return c\n"
    )
    assert recipe.load(str(file)).train.steps == 3


VARIED = """
import ml_collections
from peftax.configs import default

VARIANTS = ("paper", "repo")


def get_config(variant="paper"):
    config = default.get_config()
    config.train.steps = {"paper": 3, "repo": 5}[variant]
    return config
"""


def test_variants_of_a_recipe(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(VARIED)
    steps = [recipe.load(f"{file}{v}").train.steps for v in ("", ":paper", ":repo")]
    assert steps == [3, 3, 5] and recipe.variants(f"{file}:repo") == ("paper", "repo")
    assert recipe.load(f"{file}:repo", [("train.steps", "7")]).train.steps == 7
    with pytest.raises(ValueError, match="mine.py has no variant 'author'; it has paper, repo"):
        recipe.load(f"{file}:author")
    with pytest.raises(ValueError, match="smollm2_lora has no variant 'repo'; it has none"):
        recipe.load("smollm2_lora:repo")


def test_recipes_of_papers_are_shipped():
    assert recipe.load("papers/guanaco_13b:repo").method.dropout == 0.05
    assert recipe.load("papers/guanaco_13b").method.dropout == 0.1
    with pytest.raises(ValueError, match="no recipe 'papers/guanaco'; shipped: .*papers/guanaco_7b"):
        recipe.load("papers/guanaco")


def test_every_key_of_default_is_explained():
    source = importlib.import_module("peftax.configs.default").__file__
    lines = open(source).read().splitlines()
    for i, line in enumerate(lines):
        if line.strip().startswith("config.") and "ConfigDict()" not in line:
            assert "#" in line or "#" in lines[i - 1] or _plain(line), line


def _plain(line: str) -> bool:
    """Keys whose name says all."""
    return any(
        f".{k} =" in line
        for k in ("warmup_steps", "b1", "b2", "eps", "dropout_seed", "weight_decay", "tensorboard", "valid_split")
    )


def test_a_recipe_is_read_as_it_stands(tmp_path):
    """Also when it was written twice in one second, with as many letters; nothing is laid beside it."""
    file = tmp_path / "mine.py"
    text = """\
from peftax.configs import default


def get_config():
    config = default.get_config()
    config.train.steps = {}
    return config
"""
    for steps in (3, 7):
        file.write_text(text.format(steps))
        os.utime(file, (1e9, 1e9))
        assert recipe.load(str(file)).train.steps == steps
    assert list(tmp_path.iterdir()) == [file]


def test_a_recipe_that_is_no_python_is_named_with_its_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("STEPS = 3\ndef get_config(:\n")
    with pytest.raises(ValueError, match=r"^recipe .*mine\.py, line 2: invalid syntax$"):
        recipe.load(str(file))
