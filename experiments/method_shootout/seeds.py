"""Two more seeds, for an arm whose learning rate is chosen; `python -m` gives both."""

from experiments.method_shootout.arms import get_config as get_config

SEEDS = (1, 2)  # beside the 0 of the sweeps


def sweep(add):
    for seed in SEEDS:
        add({"seed": seed})
