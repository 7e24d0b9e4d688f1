"""The methods that have a size of their own."""

from experiments.method_shootout import arms
from experiments.method_shootout.arms import get_config as get_config


def sweep(add):
    arms.add_all(add, "native")
