"""Where arrays lie on a mesh with data, fsdp and tensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from peftax import methods, models, sharding
from peftax.core import injection, quantization, sites, tree
from peftax.ops.qtensor import QTensor
from tests.methods import tiny

LAYER = "model/layers"
MODEL = models.build({**tiny.CONFIG, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "vocab_size": 64})
SHAPES = models.abstract(MODEL)
SITES = sites.find(MODEL.apply, SHAPES, jax.ShapeDtypeStruct((1, 3), jnp.int32))


def specs(rules=(), **sizes):
    mesh = sharding.make_mesh(**sizes)
    return mesh, sharding.base_specs(SHAPES, SITES, mesh, rules)


def test_columns_over_tensor_and_rows_where_the_input_is_split():
    _, lies = specs(fsdp=2, tensor=4)
    for name in ("self_attn/q_proj", "mlp/gate_proj", "mlp/up_proj"):
        assert lies[f"{LAYER}/{name}/kernel"] == P(None, "fsdp", "tensor"), name
    for name in ("self_attn/o_proj", "mlp/down_proj"):
        assert lies[f"{LAYER}/{name}/kernel"] == P(None, "tensor", "fsdp"), name
    assert lies["model/embed_tokens/embedding"] == P("fsdp", None)
    assert set(lies[f"{LAYER}/input_layernorm/scale"]) == {None}


def test_without_tensor_the_largest_axis_over_fsdp():
    _, lies = specs(data=2, fsdp=4)
    assert lies[f"{LAYER}/mlp/up_proj/kernel"] == P(None, None, "fsdp")
    assert lies[f"{LAYER}/mlp/down_proj/kernel"] == P(None, "fsdp", None)


def test_rules_come_first_and_name_every_axis():
    _, lies = specs(rules=(("down_proj/kernel", (None, ("fsdp", "tensor"))),), fsdp=2, tensor=4)
    assert lies[f"{LAYER}/mlp/down_proj/kernel"] == P(None, ("fsdp", "tensor"), None)
    with pytest.raises(ValueError, match=r"a rule names 4 axes of '.*down_proj/kernel', which has 3"):
        specs(rules=(("down_proj/kernel", (None,) * 4),), fsdp=8)


def test_sizes_of_a_mesh():
    assert dict(sharding.make_mesh(tensor=2).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert dict(sharding.make_mesh(fsdp=2, tensor=-1).shape) == {"data": 1, "fsdp": 2, "tensor": 4}
    with pytest.raises(ValueError, match="only one of data, fsdp and tensor may be -1"):
        sharding.make_mesh(tensor=-1)
    with pytest.raises(ValueError, match="data=1 x fsdp=2 x tensor=3 is not the number of devices, 8"):
        sharding.make_mesh(fsdp=2, tensor=3)


def test_parts_of_a_packed_weight_lie_as_its_kernel():
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    scale = jax.ShapeDtypeStruct((2, 4, 1, 96), jnp.uint8)
    nested, offset = jax.ShapeDtypeStruct((2, 2), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    w = QTensor(jax.ShapeDtypeStruct((2, 128, 96), jnp.uint8), scale, None, nested, offset)
    lies = sharding.of_leaf(w, P(None, "tensor", "fsdp"), mesh)
    assert lies.packed.spec == P(None, "tensor", "fsdp") and lies.scale.spec == P(None, "tensor", None, "fsdp")
    assert lies.nested.is_fully_replicated and lies.offset.is_fully_replicated
    both = sharding.of_leaf(w, P(None, ("fsdp", "tensor"), None), mesh)
    assert both.packed.spec[1] == ("fsdp", "tensor") and both.scale.spec[1] is None  # 4 groups on 8 devices


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_over_tensor_gives_the_same_logits(packed):
    """Adapters follow their kernels; numbers are those of one device."""
    mesh, lies = specs(fsdp=2, tensor=4)
    method = methods.make("lora", rank=4)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), SHAPES)
    if packed:
        params = quantization.quantize(params, (("_proj/kernel$", {"fmt": "int8"}),), SITES)
    part = method.init(jax.random.key(0), params, SITES)
    merged = tree.merge(part.frozen, tiny.perturb(part.trainable))
    places = sharding.shardings(merged, method, SITES, lies, mesh)
    flat = tree.flatten(places)
    assert flat[f"{LAYER}/mlp/down_proj/lora/default/a"].spec[1] == "tensor"
    assert flat[f"{LAYER}/mlp/up_proj/lora/default/b"].spec[-1] == "tensor"
    batch, rows = tiny.batch(), NamedSharding(mesh, sharding.BATCH)
    logits = []
    for params, on_mesh in ((merged, {}), (jax.device_put(merged, places), {"rows": rows, "specs": lies})):
        apply = injection.inject(MODEL.apply, method, **on_mesh)
        run = jax.jit(lambda p, b, apply=apply: apply({"params": p}, b["tokens"], b["positions"], b["segment_ids"]))
        logits.append(np.asarray(run(params, jax.device_put(batch, rows) if on_mesh else batch)))
    assert tiny.distance(*(x[batch["segment_ids"] > 0] for x in logits)) <= 1e-5
