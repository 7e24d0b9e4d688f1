"""qwix's LoRA on the same linen model, in the same loss and step: what differs is how the model is adapted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import qwix

from experiments.speed import side
from experiments.speed.peftax_side import open_base, read_tokenizer, trainer
from peftax.core import tree
from peftax.core.method import Partition
from peftax.train import setup


def load(args, told):
    base = open_base(args, told)
    mine = setup.attach(base, args.inputs / args.adapter)
    config = mine.method.config
    # the tied head is no target, so `head` stays as it is
    provider = qwix.LoraProvider(module_path=r".*_proj", rank=int(config["rank"]), alpha=float(config["alpha"]))
    model = qwix.apply_lora_to_model(base.model, provider, methods=("hidden",))
    leaves = tree.flatten(mine.part.trainable)
    part = Partition(base.params, tree.unflatten({_place(path): x for path, x in leaves.items()}))

    def apply(variables, *inputs, **kwargs):
        # f32 masters, products in the base's dtype: what peftax does
        params = jax.tree.map(lambda x: x.astype(jnp.dtype(args.dtype)), variables["params"])
        return model.apply({"params": params}, *inputs, **kwargs)

    return trainer(args, told, apply, part)


def _place(path: str) -> str:
    """<site>/lora/default/a -> <site>/kernel_lora_a: both keep A as [in, rank], B as [rank, out]."""
    site, _, _, leaf = path.rsplit("/", 3)
    return f"{site}/kernel_lora_{leaf}"


def main() -> None:
    args = side.arguments(scan=1, remat="dots", chunk=128)
    read_tokenizer(args)
    side.serve(args, load)


if __name__ == "__main__":
    main()
