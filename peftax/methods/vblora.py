"""VB-LoRA: low-rank factors put together from the few best vectors of one trainable bank (Li et al., 2024).

  y  = x W + (x A) B        A, B: tiles of `length` numbers, each a mixture of the `topk` vectors of the largest logits:
  W' = W + A B              tile = sum over i in topk(logits) of softmax(those logits)_i bank_i

  logits_a : [rank, in / length, vectors]   trainable f32, N(0, logits_std²)
  logits_b : [out / length, rank, vectors]  trainable f32, N(0, logits_std²)
  bank     : [length, vectors]              trainable f32, shared by all sites, U(±bank_bound)

Not the identity at init. Trainable per site: rank vectors (in + out) / length, and length vectors once.
Learning rate: 1e-3 to 1e-2 (the authors' runs: 1e-3 on the bank, 1e-2 on the logits).
Source: https://arxiv.org/abs/2405.15179, the top-k admixture of its method section.
Departs: nothing. A file of save_only_topk_weights holds the chosen vectors alone: all other logits are -inf from then
on, so that it is good for use and for folding, not for training further.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from peftax.core import hf, lift
from peftax.core.method import Ctx, Kernel, Method
from peftax.core.targets import Targets
from peftax.ops.product import linear, narrow

AXES = {
    "logits_a": ("rank", "in_tiles", "vectors"),
    "logits_b": ("out_tiles", "rank", "vectors"),
    "bank": ("length", "vectors"),
}


def vblora(
    *,
    rank: int = 4,  # r
    vectors: int = 256,  # how many the bank holds
    length: int = 256,  # of a vector; divides inputs and outputs of every target
    topk: int = 2,  # how many vectors a tile mixes
    bank_bound: float = 0.02,  # the bank starts from U(±this)
    logits_std: float = 0.1,  # the logits start from a normal distribution of this width
    save_topk: bool = False,  # write the chosen vectors alone, for use: small, and cannot be trained on
    dropout: float = 0.0,  # probability, on the input of A
    targets: str | Sequence[str] = "all-linear",  # regex over whole names | names and suffixes | "all-linear"
    exclude: str | Sequence[str] | None = None,  # the same forms; wins
    layers: int | Sequence[int] | None = None,  # layer numbers; None takes all
    bias: str = "none",  # "none" | "all" | "vblora_only": which of the base's biases train
    modules_to_save: Sequence[str] = (),  # suffixes of modules that train whole
    adapter: str = "default",  # the name its leaves lie under
) -> Method:
    """Low-rank adaptation from a vector bank."""
    config = dict(locals())
    for key, value in (("rank", rank), ("vectors", vectors), ("length", length), ("topk", topk)):
        if value < 1:
            raise ValueError(f"vblora: {key} {value} must be at least 1")
    if topk > vectors:
        raise ValueError(f"vblora: topk {topk} must be at most vectors {vectors}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"vblora: dropout {dropout} must lie in [0, 1)")
    whole = modules_to_save or ()
    target = Targets(modules=targets, exclude=exclude, layers=layers, whole=whole, kinds=("linear",))

    def init(key, k: Kernel):
        n_in, n_out = k.w.shape
        shapes = {"logits_a": (rank, n_in // length, vectors), "logits_b": (n_out // length, rank, vectors)}
        keys = jax.random.split(key)
        return {
            "trainable": {
                leaf: logits_std * jax.random.normal(own, shape)
                for own, (leaf, shape) in zip(keys, shapes.items(), strict=True)
            }
        }

    def shared(key, shapes: Sequence[tuple[int, int]]):
        sizes = {n for shape in shapes for n in shape}
        if any(n % length for n in sizes):
            raise ValueError(
                f"vblora: length {length} must divide inputs and outputs of every target; the largest that divides "
                f"{', '.join(map(str, sorted(sizes)))} is {math.gcd(*sizes)}"
            )
        bank = jax.random.uniform(key, (length, vectors), minval=-bank_bound, maxval=bank_bound)
        return {"trainable": {"bank": bank}}

    def tiles(logits, bank):
        best, which = jax.lax.top_k(logits, topk)
        weights = jax.nn.softmax(best, axis=-1).astype(bank.dtype)
        return jnp.einsum("...k,...kn->...n", weights, jnp.take(bank.T, which, axis=0))

    def factors(theta):
        a = tiles(theta["logits_a"], theta["bank"]).reshape(rank, -1).T
        b = tiles(theta["logits_b"], theta["bank"]).swapaxes(0, 1).reshape(rank, -1)
        return a, b

    def call(theta, x, k: Kernel, ctx: Ctx):
        a, b = factors(theta)
        return linear(x, k.w, k.b) + narrow(narrow(ctx.drop(x, dropout), a), b)

    def fold(theta, k: Kernel) -> Kernel:
        a, b = factors(theta)
        return k.replace(w=k.w + a @ b)

    adapted = lift.per_kernel(
        "vblora",
        init=init,
        call=call,
        fold=fold,
        shared=shared,
        axes=AXES,
        settings=lambda name, kind: {},
        targets=target,
        draws=dropout > 0,
        adapter=adapter,
        exact=("logits_a", "logits_b"),  # in fewer bits other vectors may be the best
    )
    return lift.with_base(adapted, target, bias=bias, config=config)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **hf.read_targets(config),
        "rank": config.get("r", 4),
        "vectors": config.get("num_vectors", 256),
        "length": config.get("vector_length", 256),
        "topk": config.get("topk", 2),
        "bank_bound": config.get("init_vector_bank_bound", 0.02),
        "logits_std": config.get("init_logits_std", 0.1),
        "save_topk": config.get("save_only_topk_weights", False),
        "dropout": config.get("vblora_dropout", 0.0),
        "bias": config.get("bias", "none"),
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **hf.write_targets(config),
        "r": config["rank"],
        "num_vectors": config["vectors"],
        "vector_length": config["length"],
        "topk": config["topk"],
        "init_vector_bank_bound": config["bank_bound"],
        "init_logits_std": config["logits_std"],
        "save_only_topk_weights": config["save_topk"],
        "vblora_dropout": config["dropout"],
        "bias": config["bias"],
    }


def _opened(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Logits from the chosen vectors' numbers and weights, of which the last makes the sum one."""
    logits = {}
    if config["save_topk"]:
        logging.warning("vblora: the file holds the chosen vectors alone; use it or fold it, it cannot train further")
    for key in [k for k in tensors if k.endswith(_CHOSEN)]:
        name = key.removesuffix(_CHOSEN)
        if name + _WEIGHTS not in tensors:
            raise ValueError(f"vblora: the file holds {key!r} and no {name + _WEIGHTS!r}")
        which, weights = tensors[key].astype(np.int64), tensors[name + _WEIGHTS].astype(np.float64)
        if which.shape != (*weights.shape[:-1], weights.shape[-1] + 1):
            raise ValueError(f"vblora: {key!r} {which.shape} does not belong to weights {weights.shape}, one less each")
        if not 0 <= which.min() <= which.max() < config["vectors"]:
            raise ValueError(
                f"vblora: {key!r} chooses vectors {which.min()} to {which.max()} of a bank of {config['vectors']}"
            )
        weights = np.maximum(np.concatenate([weights, 1 - weights.sum(-1, keepdims=True)], -1), 0)
        with np.errstate(divide="ignore"):
            known = np.log(weights) - np.log(weights.max(-1, keepdims=True))
        logits[name] = np.full((*weights.shape[:-1], config["vectors"]), -np.inf, np.float32)
        np.put_along_axis(logits[name], which, known.astype(np.float32), axis=-1)
    return {**{k: v for k, v in tensors.items() if not k.endswith((_CHOSEN, _WEIGHTS))}, **logits}


def _closed(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not config["save_topk"]:
        return dict(tensors)
    written = {}
    small = next(t for n, t in ((8, np.uint8), (15, np.int16), (31, np.int32)) if config["vectors"] < 2**n)
    for key, value in tensors.items():
        if not key.endswith((".vblora_logits_A", ".vblora_logits_B")):
            written[key] = value
            continue
        which = np.argsort(-value, axis=-1, kind="stable")[..., : config["topk"]]
        best = np.take_along_axis(value, which, axis=-1).astype(np.float64)
        weights = np.exp(best - best[..., :1])
        weights /= weights.sum(-1, keepdims=True)
        written[key + _CHOSEN], written[key + _WEIGHTS] = which.astype(small), weights[..., :-1].astype(np.float32)
    return written


_CHOSEN, _WEIGHTS = "_topk_indices", "_topk_weights"

HF = hf.Format(
    peft_type="VBLORA",
    keys={"linear": {"logits_a": "vblora_logits_A", "logits_b": "vblora_logits_B"}},
    shared={"bank": "base_model.vblora_vector_bank"},
    read=_read,
    write=_write,
    opened=_opened,
    closed=_closed,
)
