"""LN-tuning: train the norms and nothing else (Zhao et al., 2023).

  y = norm(x) ⊙ g + b,   g and b trainable          W' = W, g' = g, b' = b

  scale : [width]   trainable, pretrained values
  bias  : [width]   trainable, pretrained values, where the norm has one

Identity at init. Trainable per norm: its width, with a bias twice that.
Learning rate: 1e-4 to 1e-3 (PEFT's MetaMathQA run: 1e-4, with which it answers nothing right).
Source: https://arxiv.org/abs/2312.11420.
Departs: the norms alone, which the paper calls LayerNorm-simple; its other runs train embedding and head too. Every
norm of the model by default: Hugging Face PEFT has a list for each model type, which leaves norms of queries and keys
out, and for Qwen all but those after attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftax.core import hf, lift
from peftax.core.method import Method
from peftax.core.targets import Targets


def ln_tuning(
    *,
    targets: str | Sequence[str] = r"(?i).*norm(_\d+)?",  # regex over whole names | names and suffixes
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    modules_to_save: Sequence[str] = (),  # suffixes of other modules that train whole
) -> Method:
    """The norms of the matching modules."""
    config = dict(locals())
    target = Targets(modules=targets, exclude=exclude, whole=modules_to_save or (), kinds=("norm",))

    def chosen(name: str) -> bool:
        return target.match(name.rpartition(".")[0], "norm")

    return lift.with_base(lift.select("ln_tuning", chosen), target, config=config)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = hf.read_targets(config)
    del fields["layers"]
    return fields


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = hf.write_targets({**config, "layers": None}, known=("exclude",))
    del fields["fan_in_fan_out"]
    return fields


HF = hf.Format(peft_type="LN_TUNING", inside="ln_tuning_layers", read=_read, write=_write)
