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
    assert lies["model/embed_tokens/embedding"] == P("fsdp", "tensor")
    assert set(lies[f"{LAYER}/input_layernorm/scale"]) == {None}


def test_without_tensor_the_largest_axis_over_fsdp():
    _, lies = specs(data=2, fsdp=4)
    assert lies[f"{LAYER}/mlp/up_proj/kernel"] == P(None, None, "fsdp")
    assert lies[f"{LAYER}/mlp/down_proj/kernel"] == P(None, "fsdp", None)


def test_rules_come_first_and_name_every_axis():
    _, lies = specs(rules=(("down_proj/kernel", (None, ("fsdp", "tensor"))),), fsdp=2, tensor=4)
    assert lies[f"{LAYER}/mlp/down_proj/kernel"] == P(None, ("fsdp", "tensor"), None)
    with pytest.raises(ValueError, match=r"rule 'down_proj/kernel' names 4 axes of '.*down_proj/kernel', which has 3"):
        specs(rules=(("down_proj/kernel", (None,) * 4),), fsdp=8)


def test_devices_that_share_tokens_share_weights():
    """Over fsdp and sequence together, where both divide: 96 columns on 8 devices, 24 rows of a table on 4 alone."""
    _, lies = specs(fsdp=4, sequence=2)
    assert lies[f"{LAYER}/mlp/up_proj/kernel"] == P(None, None, ("fsdp", "sequence"))
    own = {"model/embed_tokens/embedding": jax.ShapeDtypeStruct((36, 35), jnp.float32)}
    assert sharding.base_specs(own, SITES, sharding.make_mesh(fsdp=4, sequence=2)) == {
        "model/embed_tokens/embedding": P("fsdp", None)
    }


def test_a_tied_table_lies_as_the_head_that_it_is():
    model = models.build({**tiny.CONFIG, "vocab_size": 64, "hidden_size": 32, "tie_word_embeddings": True})
    shapes = models.abstract(model)
    found = sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 3), jnp.int32))
    lies = sharding.base_specs(shapes, found, sharding.make_mesh(fsdp=2, tensor=4))
    assert lies["model/embed_tokens/embedding"] == P("tensor", "fsdp")


@pytest.mark.parametrize(
    ("rule", "told"),
    {
        (
            "up_proj/kernel",
            (None, "model"),
        ): r"names 'model', no axis of the mesh \(data, fsdp, tensor, sequence\); nearest",
        ("up_proj/kernel", (None, "fsdp", "fsdp")): "names 'fsdp' twice",
        ("upproj", (None, "fsdp")): "matches no parameter; nearest: '.*up_proj",
        ("k_proj/bias", (None, ("fsdp", "tensor", "data"))): "",
        ("norm/scale", ("fsdp",)): "splits axis 0 of '.*input_layernorm/scale', 2, over fsdp=4, .* axis 1, 32, can be",
    }.items(),
)
def test_a_rule_that_cannot_be_followed_is_told(rule, told):
    if not told:
        assert specs(rules=(rule,), fsdp=4, tensor=2)
        return
    with pytest.raises(ValueError, match=f"mesh: rule '{rule[0]}' {told}"):
        specs(rules=(rule,), fsdp=4, tensor=2)


def test_where_a_batch_lies():
    mesh = sharding.make_mesh(data=2, fsdp=2, sequence=2)
    rows = ("data", "fsdp")
    assert sharding.of_batch((8, 6), mesh).spec == P(rows, "sequence")
    assert sharding.of_batch((3, 8, 6), mesh, parts=True).spec == P(None, rows, "sequence")
    assert sharding.of_batch((8, 1), mesh).spec == P(rows, None)  # a number a row
    assert sharding.of_batch((8,), mesh).spec == P(rows)


def test_a_report_of_what_lies_where():
    """Bytes of all layers' leaves on one device; a table of 37 rows stays whole where only its rows could be split."""
    mesh, lies = specs(fsdp=2, tensor=4)
    places = tree.unflatten({p: NamedSharding(mesh, s) for p, s in lies.items()})
    kinds = {k.path: k for k in sharding.report(SHAPES, places, SITES, lies, mesh)}
    up = kinds[f"{LAYER}/mlp/up_proj/kernel"]
    assert (up.leaves, up.shape, up.bytes, up.whole) == (1, (2, 32, 64), 2 * 32 * 64 * 4 // 8, ())
    assert kinds[f"{LAYER}/input_layernorm/scale"].whole == ()
    mesh = sharding.make_mesh(fsdp=1, tensor=8)
    odd = {"lm_head": {"kernel": jax.ShapeDtypeStruct((32, 37), jnp.float32)}}
    lies = sharding.base_specs(odd, SITES, mesh)
    (kind,) = sharding.report(odd, {"lm_head": {"kernel": NamedSharding(mesh, P())}}, SITES, lies, mesh)
    assert (kind.whole, kind.bytes) == (("tensor",), 32 * 37 * 4)


def test_sizes_of_a_mesh():
    assert dict(sharding.make_mesh(tensor=2).shape) == {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1}
    assert dict(sharding.make_mesh(fsdp=2, sequence=-1).shape) == {"data": 1, "fsdp": 2, "tensor": 1, "sequence": 4}
    with pytest.raises(ValueError, match="only one of data, fsdp, tensor and sequence may be -1"):
        sharding.make_mesh(tensor=-1)
    with pytest.raises(ValueError, match="data=1 x fsdp=2 x tensor=3 x sequence=1 is not the number of devices, 8"):
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
    assert both.packed.spec[1] == ("fsdp", "tensor")
    assert both.scale.spec == P(None, None, None, ("fsdp", "tensor"))  # 4 groups on 8 devices: over the columns


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
