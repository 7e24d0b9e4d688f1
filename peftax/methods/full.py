"""Full fine-tuning: every leaf of the base trains; the yardstick of all the others.

  W' = W,  all of W trainable

Identity at init. Trainable: all, or what `targets` matches.
Learning rate: 1e-6 to 1e-4 (a tenth of LoRA's: "LoRA Without Regret", Schulman et al. 2025).
Source: none; it is what the papers compare with.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftax.core import lift
from peftax.core.method import Method
from peftax.core.targets import named


def full(
    *,
    targets: str | Sequence[str] = ".*",  # regex over whole names | names and suffixes, of modules whose leaves train
) -> Method:
    """All leaves of the matching modules."""
    config = dict(locals())

    def chosen(name: str) -> bool:
        return named(targets, name.rpartition(".")[0])

    return lift.select("full", chosen, config=config)
