"""(IA)³: one trainable factor for each output, or for each input of a feed-forward layer (Liu et al., 2022).

  y = (x W + b) ⊙ l        W' = W diag(l),  b' = b ⊙ l
  y = (x ⊙ l) W + b        W' = diag(l) W                 where `feedforward` matches

  l_out : [1, out]  trainable f32, ones
  l_in  : [in, 1]   trainable f32, ones

Identity at init. Trainable per site: out, or in.
Learning rate: 1e-3 to 5e-3 (T-Few: 3e-3 under Adafactor; PEFT's MetaMathQA runs: 1e-3 and 5e-3).
Source: https://arxiv.org/abs/2205.05638, section 3.3. Departs: the bias is scaled with the output, as in Hugging
Face PEFT; the paper's model has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from peftax.core import hf, lift
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Targets
from peftax.ops.product import last, linear

AXES = {"l_out": ("one", "out"), "l_in": ("in", "one")}


def ia3(
    *,
    targets: str | Sequence[str] = ("k_proj", "v_proj", "down_proj"),  # regex | names and suffixes | "all-linear"
    feedforward: str | Sequence[str] = ("down_proj",),  # the targets whose input is scaled; the same forms
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Learned factors on keys, values and feed-forward activations."""
    config = dict(locals())
    whole = modules_to_save or ()
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=whole, kinds=("linear", "conv"))
    inputs = Targets(modules=feedforward) if feedforward else None

    def settings(name: str, kind: str) -> dict[str, Any]:
        scales_input = inputs is not None and inputs.match(name, kind)
        if scales_input and kind == "conv":  # a factor here is one place of a patch's, not one channel's
            raise ValueError(f"ia3: {name!r} is a convolution; only its output is scaled: take it out of feedforward")
        return {"scales_input": scales_input}

    def init(key, k: Kernel, *, scales_input: bool):
        n_in, n_out = k.w.shape
        return {"trainable": {"l_in": jnp.ones((n_in, 1))} if scales_input else {"l_out": jnp.ones((1, n_out))}}

    def call(theta, x, k: Kernel, ctx: Ctx):
        if "l_in" in theta:
            return linear((x * last(theta["l_in"], x)).astype(x.dtype), k.w, k.b)
        y = linear(x, k.w, k.b)
        return (y * last(theta["l_out"], y)).astype(y.dtype)

    def fold(theta, k: Kernel) -> Kernel:
        if "l_in" in theta:
            return k.replace(w=k.w * theta["l_in"])
        return k.replace(w=k.w * theta["l_out"], b=None if k.b is None else k.b * theta["l_out"][0])

    adapted = lift.per_kernel(
        "ia3",
        init=init,
        call=call,
        fold=fold,
        axes=AXES,
        settings=settings,
        targets=target,
        adapter=adapter,
        exact=("l_out", "l_in"),  # what is near 1 would be rounded to it
    )
    return lift.with_base(adapted, target, config=config)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**hf.read_targets(config), "feedforward": config.get("feedforward_modules") or ()}


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = hf.write_targets(config, known=("exclude",))
    return {**fields, "feedforward_modules": config["feedforward"] or [], "init_ia3_weights": True}


HF = hf.Format(
    peft_type="IA3",
    keys={"linear": {"l_out": "ia3_l", "l_in": "ia3_l"}, "conv": {"l_out": "ia3_l"}},
    windows=("l_out",),
    takes=lambda window: len(window) in (2, 3),
    read=_read,
    write=_write,
)
