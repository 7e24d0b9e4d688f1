"""The training step: gradients over the trainable half, one compile, frozen as an argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from peftax.core import tree
from peftax.core.method import Ctx


@struct.dataclass
class State:
    """What a step replaces: the step's number, the trainable half, the optimizer's state."""

    step: jax.Array
    trainable: Any
    opt_state: Any

    @classmethod
    def create(cls, trainable, optimizer: optax.GradientTransformation) -> State:
        return cls(jnp.int32(0), trainable, optimizer.init(trainable))


def state_shardings(state: State, trainable: Any, optimizer: optax.GradientTransformation, replicated):
    """The optimizer's state lies as the leaves that it belongs to: those at the end of its own path, of their shape."""
    del optimizer
    shapes = {path: x.shape for path, x in tree.flatten(state.trainable).items()}
    places = tree.flatten(trainable)

    def place(path, x):
        keys = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
        ends = ("/".join(keys[i:]) for i in range(len(keys)))
        own = next((end for end in ends if end in places), None)
        return replicated if own is None or shapes[own] != x.shape else places[own]

    return State(replicated, trainable, jax.tree_util.tree_map_with_path(place, state.opt_state))


def make_step(
    apply: Callable,
    loss: Callable[..., tuple[jax.Array, jax.Array]],
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    dropout_seed: int | None = None,
    penalty: Callable[[Any], jax.Array] | None = None,
    shardings: State | None = None,
) -> Callable[[State, Mapping[str, Any], Any], tuple[State, dict[str, jax.Array]]]:
    """A jitted step(state, frozen, batch) -> (state, metrics). The state is donated; frozen never is.

    Args:
      shardings: of the state; pinned on the way out, so that the second step finds the first one's program.
      The others: as in plain_step.
    """
    step = plain_step(apply, loss, optimizer, accumulate=accumulate, dropout_seed=dropout_seed, penalty=penalty)
    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def plain_step(
    apply: Callable,
    loss: Callable[..., tuple[jax.Array, jax.Array]],
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    dropout_seed: int | jax.Array | None = None,
    penalty: Callable[[Any], jax.Array] | None = None,
) -> Callable[[State, Mapping[str, Any], Any], tuple[State, dict[str, jax.Array]]]:
    """step(state, frozen, batch) -> (state, metrics), to be jitted or mapped over.

    Args:
      apply: an injected apply.
      loss: (apply, params, batch, ctx) -> (sum, weight); the gradient is of sum / weight over the whole batch.
      accumulate: k > 1: batch leaves are [k, b, ...]; equals one batch of k·b, since sums and weights add up first.
      dropout_seed: None trains without dropout.
      penalty: params -> scalar, added to the mean loss.

    Returns:
      metrics: loss, weight (tokens that count), grad_norm, finite. A step whose loss or gradient is not finite
        changes nothing.
    """

    def total(trainable, frozen, batch, key):
        ctx = None if key is None else Ctx(key=key)
        params = tree.merge(frozen, trainable)
        value, weight = loss(apply, params, batch, ctx)
        return value if penalty is None else value + weight * penalty(params), weight

    grad = jax.value_and_grad(total, has_aux=True)
    rule = optax.with_extra_args_support(optimizer)  # most need nothing of the frozen half

    def step(state: State, frozen, batch):
        key = None
        if dropout_seed is not None:
            key = jax.random.fold_in(jax.random.key(dropout_seed), state.step)
        if accumulate == 1:
            (value, weight), grads = grad(state.trainable, frozen, batch, key)
        else:

            def add(sums, micro):
                i, batch = micro
                micro_key = None if key is None else jax.random.fold_in(key, i)
                (value, weight), grads = grad(state.trainable, frozen, batch, micro_key)
                return jax.tree.map(jnp.add, sums, (value, weight, grads)), None

            zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trainable))
            (value, weight, grads), _ = jax.lax.scan(add, zero, (jnp.arange(accumulate), batch))
        weight = jnp.maximum(weight, 1e-9)
        grads = jax.tree.map(lambda g: (g / weight).astype(g.dtype), grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(value)
        updates, opt_state = rule.update(grads, state.opt_state, state.trainable, frozen=frozen)
        new = (optax.apply_updates(state.trainable, updates), opt_state)
        trainable, opt_state = jax.tree.map(
            lambda a, b: jnp.where(finite, a, b), new, (state.trainable, state.opt_state)
        )
        metrics = {"loss": value / weight, "weight": weight, "grad_norm": norm, "finite": finite}
        return State(state.step + 1, trainable, opt_state), metrics

    return step
