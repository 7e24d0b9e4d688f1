"""The sweeps of experiments/: every member can be, every arm has as many trials, and at least three learning rates."""

from pathlib import Path

import pytest

from peftax import recipe, sweep

HERE = Path(__file__).parents[1] / "experiments"
SWEEPS = sorted(f for f in HERE.glob("*/*.py") if "def sweep(add)" in f.read_text() and f.stem != "seeds")


@pytest.mark.parametrize("file", SWEEPS, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_every_arm_has_as_many_trials(file):
    arms: dict[str, list[str]] = {}
    for own in sweep.members(str(file)).values():
        recipe.load(str(file), own)
        arms.setdefault(str(sweep.arm(own)), []).append(dict(own)[sweep.RATE])
    rates = {name: len(set(tried)) for name, tried in arms.items()}
    assert len({len(tried) for tried in arms.values()}) == 1, {name: len(tried) for name, tried in arms.items()}
    assert min(rates.values()) >= 3, rates
