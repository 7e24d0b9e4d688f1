"""The recipe of config.py with other seeds, for an arm whose learning rate is chosen; `python -m` gives both."""

from experiments.sentence_sentiment.config import get_config as get_config

SEEDS = (1, 2)  # beside the 0 of the sweep


def sweep(add):
    for seed in SEEDS:
        add({"seed": seed})
