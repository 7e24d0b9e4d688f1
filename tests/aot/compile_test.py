"""A LoRA train step compiles for a TPU and for GPUs that are not here, and its memory is known."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.aot import machines

pytestmark = pytest.mark.aot

LAYERS, WIDTH, RANK = 16, 2048, 16
BATCH, LENGTH = 16, 1024  # what is kept for the backward pass must not fit a TPU's VMEM (128 MiB)
WORKSPACE = 32 << 20  # cublasLt's on an H100; XLA counts it as a temporary

# name: platform, its devices, the size of the data axis, a mark of the compiler in the program
CASES = {
    "v5e-1": ("tpu", lambda: machines.tpu("v5e:1x1"), 1, b"TPU v5 lite"),
    "v5e-4": ("tpu", lambda: machines.tpu("v5e:2x2"), 2, b"TPU v5 lite"),
    "a100-1": ("cuda", lambda: machines.gpu("a100_80gb"), 1, b"sm_80"),
    "h100-1": ("cuda", lambda: machines.gpu("h100"), 1, b"sm_90"),
    "h100-8": ("cuda", lambda: machines.gpu("h100", count=8), 2, b"sm_90"),
}


def step_for(devices: Sequence[jax.Device], data: int = 1):
    """A jitted step and its abstract arguments (state, frozen, batch), laid out over `devices`.

    A stand-in: residual layers x + tanh(x W + x a b), scanned, W frozen and bf16. The batch is
    split over both axes; what is frozen, and theta with its optimizer, over fsdp.
    """
    mesh = Mesh(np.array(devices).reshape(data, -1), ("data", "fsdp"))

    def at(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    def abstract(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=at(*spec))

    optimizer = optax.adamw(1e-4)
    trainable = {
        "a": abstract((LAYERS, WIDTH, RANK), jnp.float32, None, "fsdp", None),
        "b": abstract((LAYERS, RANK, WIDTH), jnp.float32, None, None, "fsdp"),
    }
    shardings = optax.tree.map_params(
        optimizer,
        lambda _, like: like.sharding,
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda _: at(),
    )
    moments = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(optimizer.init, trainable),
        shardings,
    )
    state = {"trainable": trainable, "optimizer": moments}
    frozen = {"kernel": abstract((LAYERS, WIDTH, WIDTH), jnp.bfloat16, None, "fsdp", None)}
    rows = abstract((BATCH, LENGTH, WIDTH), jnp.bfloat16, ("data", "fsdp"), None, None)
    batch = {"x": rows, "y": rows}

    @jax.checkpoint
    def layer(x_BxTxD, leaves):
        w, a, b = (leaves[k].astype(x_BxTxD.dtype) for k in ("kernel", "a", "b"))
        x_BxTxD = x_BxTxD + jnp.tanh(x_BxTxD @ w + (x_BxTxD @ a) @ b)
        return jax.lax.with_sharding_constraint(x_BxTxD, rows.sharding), None

    def loss_of(trainable, frozen, batch):
        y_BxTxD, _ = jax.lax.scan(layer, batch["x"], {**frozen, **trainable})
        return jnp.mean(jnp.square((y_BxTxD - batch["y"]).astype(jnp.float32)))

    def step(state, frozen, batch):
        loss, grads = jax.value_and_grad(loss_of)(state["trainable"], frozen, batch)
        updates, moments = optimizer.update(grads, state["optimizer"], state["trainable"])
        trainable = optax.apply_updates(state["trainable"], updates)
        return {"trainable": trainable, "optimizer": moments}, loss

    out = (jax.tree.map(lambda leaf: leaf.sharding, state), at())
    return jax.jit(step, donate_argnums=0, out_shardings=out), (state, frozen, batch)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    platform, devices_of, data, mark = CASES[request.param]
    if why := machines.missing(platform):
        pytest.skip(why)
    devices = devices_of()
    step, args = step_for(devices, data)
    return platform, devices, args, mark, machines.compile(step, *args)


def test_targets_the_machine(case):
    platform, devices, _, mark, compiled = case
    text = compiled.as_text()
    code = serialize_executable.serialize(compiled)[0]
    assert mark in code
    if platform == "tpu":
        assert "T(8,128)" in text  # tiled layouts are the TPU's
    else:
        assert "__cublas$lt" in text
        assert b"\x7fELF" in code  # machine code, not only PTX
    gathers = "all-gather" in text
    assert gathers == (len(devices) > 1)


def test_memory(case):
    platform, devices, args, _, compiled = case
    memory = machines.memory(compiled)
    expected = machines.shard_bytes(args)
    leaves = len(jax.tree.leaves(args))
    padding = 512 * leaves if platform == "tpu" else 0  # a scalar takes a tile
    assert expected <= memory["arguments"] <= expected + padding

    # theta and its optimizer state are given back in place; besides them only the loss comes out
    returned = machines.shard_bytes(args[0])
    assert memory["aliases"] >= returned
    assert memory["outputs"] - memory["aliases"] <= 2048

    # kept for the backward pass: each layer's input; while working: a few activations, in f32
    activation = BATCH * LENGTH * WIDTH // len(devices)
    kept = 2 * LAYERS * activation
    assert memory["temporaries"] <= kept + 5 * 4 * activation + WORKSPACE
    assert memory["bytes"] >= memory["arguments"] + kept


def test_no_whole_stack_in_float32(case):
    *_, (_, frozen, _), _, compiled = case
    kernel = frozen["kernel"]
    text = compiled.as_text()
    for shape in (kernel.shape, kernel.sharding.shard_shape(kernel.shape)):
        assert f"f32[{','.join(map(str, shape))}]" not in text


def test_unknown_gpu_names_the_known():
    with pytest.raises(ValueError, match="known: a100_80gb, h100"):
        machines.gpu("h1000")
