"""Whole programs of a Llama with LoRA in shapes: a training step, an evaluation, decoding, and several adapters on one
base.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from peftax import methods, models, sharding
from peftax.core import injection, quantization, sites, tree
from peftax.core.method import Partition
from peftax.train import loss
from peftax.train.generate import Generator
from peftax.train.step import State, make_step, state_shardings

CHUNK = 128
BASE = {"model_type": "llama", "rope_theta": 500000.0}
LLAMA_1B = {  # Llama-3.2-1B's shapes, a quarter of its layers and of its vocabulary
    **BASE,
    **dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, vocab_size=30720, tie_word_embeddings=True),
    **dict(num_attention_heads=32, num_key_value_heads=8),
}
LLAMA_8B = {  # Llama-3.1-8B, whole
    **BASE,
    **dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256),
    **dict(num_attention_heads=32, num_key_value_heads=8),
}
LLAMA_70B = {  # Llama-3.1-70B, whole
    **BASE,
    **dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, vocab_size=128256),
    **dict(num_attention_heads=64, num_key_value_heads=8),
}
LLAMA_405B = {  # Llama-3.1-405B, whole
    **BASE,
    **dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, vocab_size=128256),
    **dict(num_attention_heads=128, num_key_value_heads=8),
}
NF4 = (("_proj/kernel$", {"fmt": "nf4", "group": 64, "double": True}),)  # of every layer
KINDS = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32) | {"weights": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Program:
    """A model on devices that are not here. `rules` say which kernels lie in few bits, `mesh` how devices share."""

    devices: Sequence[jax.Device]
    config: Mapping[str, Any] = dataclasses.field(default_factory=lambda: LLAMA_1B)
    rules: quantization.Rules = ()
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    batch: int = 8
    length: int = 1024
    remat: str = "full"
    attention: str = "auto"
    lora: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"rank": 16})

    def __post_init__(self):
        how = {"remat": self.remat, "attention": self.attention, "dtype": "bfloat16", "param_dtype": "bfloat16"}
        model = models.build(self.config, scan=True, **how)
        shapes = models.abstract(model)
        found = sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32))
        grid = sharding.make_mesh(**self.mesh, devices=self.devices)
        specs = sharding.base_specs(shapes, found, grid)
        rows = NamedSharding(grid, sharding.BATCH)
        method = methods.make("lora", **self.lora)
        on_mesh = {"rows": rows, "specs": specs} if len(self.devices) > 1 else {}
        apply = injection.inject(model.apply, method, **on_mesh)
        base = quantization.quantize(shapes, self.rules, found)
        for name, value in dict(locals()).items():
            if name not in ("self", "shapes", "on_mesh", "how"):
                object.__setattr__(self, f"_{name}", value)

    @cached_property
    def halves(self) -> Partition:
        """frozen and trainable, each leaf in its place."""
        shapes = jax.eval_shape(lambda p: self._method.init(jax.random.key(0), p, self._found), self._base)
        lie = partial(sharding.shardings, method=self._method, sites=self._found, base=self._specs, mesh=self._grid)
        return Partition(*(_placed(half, lie(half)) for half in shapes))

    def batch_of(self, *lead: int) -> dict[str, jax.ShapeDtypeStruct]:
        at = NamedSharding(self._grid, PartitionSpec(*(None,) * len(lead), *sharding.BATCH))
        shape = (*lead, self.batch, self.length)
        return {name: jax.ShapeDtypeStruct(shape, kind, sharding=at) for name, kind in KINDS.items()}

    def train(self):
        """(the jitted step, its arguments: state, frozen, batch)"""
        frozen, trainable = self.halves
        optimizer = optax.adamw(1e-4)
        state = jax.eval_shape(lambda t: State.create(t, optimizer), trainable)
        lies = jax.tree.map(lambda x: x.sharding, trainable)
        places = state_shardings(state, lies, optimizer, self._whole)
        step = make_step(self._apply, self._loss, optimizer, shardings=places)
        return step, (_placed(state, places), frozen, self.batch_of())

    def evaluate(self):
        """The loss of a batch."""
        score = jax.jit(lambda params, batch: self._loss(self._apply, params, batch))
        return score, (tree.merge(*self.halves), self.batch_of())

    def decode(self, new: int = 32):
        """A batch of prompts is read and continued."""
        generator = Generator(self._apply, self._model.init_cache, max_new_tokens=new, eos_ids=(0,))
        tokens, rows = self.batch_of()["tokens"], sharding.of_batch((self.batch,), self._grid)
        numbers = jax.ShapeDtypeStruct((self.batch,), jnp.int32, sharding=rows)
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=self._whole)
        run = jax.jit(partial(generator._continue, before=0))
        return run, (tree.merge(*self.halves), None, tokens, numbers, numbers, key, None)

    def population(self, members: int):
        """The gradients of several adapters, each on its own batch."""
        frozen, trainable = self.halves
        many = {
            path: jax.ShapeDtypeStruct((members, *x.shape), x.dtype, sharding=self._whole)
            for path, x in tree.flatten(trainable).items()
        }

        def total(trainable, frozen, batch):
            value, weight = self._loss(self._apply, tree.merge(frozen, trainable), batch)
            return value / weight

        step = jax.jit(jax.vmap(jax.value_and_grad(total), (0, None, 0)))
        return step, (tree.unflatten(many), frozen, self.batch_of(members))

    @property
    def _whole(self) -> NamedSharding:
        return NamedSharding(self._grid, PartitionSpec())

    def _loss(self, apply, params, batch, ctx=None):
        return loss.causal_lm(apply, params, batch, ctx, chunk=CHUNK)


def _placed(shapes, places):
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places)
