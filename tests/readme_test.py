"""The README's Python runs as it stands and does what it says."""

import re
from pathlib import Path

import jax.numpy as jnp

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_api_example_trains_and_folds():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    x, apply, merged = names["x"], names["apply"], names["peftax"].merge(names["frozen"], names["trainable"])
    first = jnp.mean((names["net"].apply({"params": names["params"]}, x) - jnp.sin(3 * x)) ** 2)
    assert names["value"] < 0.2 * first
    folded = names["net"].apply({"params": names["plain"]}, x)
    assert jnp.abs(folded - apply({"params": merged}, x)).max() < 1e-4


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
