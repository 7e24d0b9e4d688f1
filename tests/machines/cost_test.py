"""Operations against the closed formula; the bytes of a program's text against those counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from peftax import recipe, sharding
from peftax.machines import cost
from peftax.train import programs, setup
from peftax.weights.outlines import Outline

LLAMA = {
    "model_type": "llama",
    **dict(hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2),
    **dict(vocab_size=1024, rms_norm_eps=1e-5),
}
NF4 = (("_proj/kernel$", {"fmt": "nf4", "group": 64, "double": True}),)


def closed_formula(config: dict, *, rows: int, length: int, rank: int, remat: bool) -> float:
    """Operations of a LoRA step on all linear layers, the base frozen: each product is 2 M K N.

    Of each kernel y = x W and dx = dy Wᵀ, and y once more where remat makes it again (down_proj's y nobody needs); of
    its factors x a, (x a) b, and four products for their slopes and x's. Attention in four causal blocks meets 5/8 of
    the keys: two products forward, five backward. The head makes logits and their slope, once each.
    """
    d, f, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim", d // heads)
    kernels = {
        **{"q": (d, heads * size), "k": (d, keys * size), "v": (d, keys * size), "o": (heads * size, d)},
        **{"gate": (d, f), "up": (d, f), "down": (f, d)},
    }
    m = rows * length
    total = 0.0
    for name, (k, n) in kernels.items():
        again = remat and name != "down"
        total += 2 * m * k * n * (2 + again)
        total += 2 * m * rank * ((k + n) * 3 + (k if remat else 0) + (n if again else 0))
    total += 2 * rows * heads * length * length * size * 5 / 8 * (2 + 5 + 2 * remat)
    return layers * total + 2 * 2 * m * d * config["vocab_size"]


def sketched(config: dict, **overrides) -> tuple[setup.Run, dict]:
    settings = recipe.load("default", [(k.replace("__", "."), str(v)) for k, v in overrides.items()]).to_dict()
    base = setup.outline(
        **{**settings["model"], "path": "a model"},
        mesh={"fsdp": 1},
        files=Outline("a model", config),
        devices=jax.devices()[:1],
    )
    return setup.sketch(base, settings["method"]), settings


@pytest.mark.parametrize("remat", ["full", "none"])
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("rules", [(), NF4], ids=["dense", "nf4"])
def test_operations_are_the_closed_formulas(rules, scan, remat):
    run, config = sketched(
        LLAMA,
        model__scan=scan,
        model__remat=remat,
        model__quantize=rules,
        method__rank=8,
        method__targets="all-linear",
        train__batch_size=2,
        data__length=512,
    )
    step = programs.every(run, config)["step"]
    found = cost.flops(step.run.trace(*step.args))
    wanted = closed_formula(LLAMA, rows=2, length=512, rank=8, remat=remat == "full")
    assert abs(found - wanted) < 0.02 * wanted, (found / wanted, found, wanted)


def test_operations_of_parts_add_up_over_a_mesh():
    mesh = sharding.make_mesh(fsdp=8)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((32, 16), jnp.float32)
    spec = (PartitionSpec("fsdp"), PartitionSpec())
    product = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=spec, out_specs=PartitionSpec("fsdp"))
    assert cost.flops(jax.jit(product).trace(x, w)) == 2 * 64 * 32 * 16


def test_of_branches_the_dearest_counts_and_what_nobody_needs_does_not():
    def f(on, x):
        unused = x @ x
        del unused
        return jax.lax.cond(on, lambda x: x @ x @ x, lambda x: x @ x, x)

    traced = jax.jit(f).trace(jnp.array(True), jnp.ones((8, 8)))
    assert cost.flops(traced) == 2 * 2 * 8**3


def test_messages_of_a_compiled_loop():
    """A loop of five turns on eight devices: each gathers its part of w, 7/8 of [64, 32] in f32 come from others."""
    mesh = sharding.make_mesh(fsdp=8)

    def body(h, w):
        return jnp.tanh(h @ jax.lax.all_gather(w, "fsdp", tiled=True)), None

    def f(h, ws):
        h = jax.lax.scan(body, h, ws)[0]
        return jax.lax.psum(h, "fsdp")

    spec = (PartitionSpec(), PartitionSpec(None, "fsdp"))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False)
    ws = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, spec[1]))
    h = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, spec[0]))
    found = cost.traffic(jax.jit(mapped).lower(h, ws).compile())
    assert found.messages == {"all-gather": 5 * 64 * 64 * 4 * 7 // 8, "all-reduce": 2 * 16 * 64 * 4 * 7 // 8}
    assert found.memory > 5 * 64 * 64 * 4  # the gathered weight is written and read each turn


def test_messages_that_stay_within_a_host():
    """Of two hosts of four devices: a sum over `tensor` stays in one, a sum over `fsdp` does not."""
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    h = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))

    def far(*axes: str) -> int:
        f = jax.shard_map(
            lambda h: jax.lax.psum(h, axes),
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        compiled = jax.jit(f).lower(h).compile()
        assert cost.traffic(compiled).messages
        return sum(cost.traffic(compiled, across=4).messages.values())

    assert far("tensor") == 0 and far("fsdp") == 2 * 16 * 64 * 4 // 2 and far("fsdp", "tensor") > 0


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups={{0,1},{2,3}}, use_global_device_ids=true", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2] {'axis_1'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([2,4]T(1,0)) {'c'}", [[0, 4, 1, 5], [2, 6, 3, 7]]),
        ("replica_groups={}", None),
    ],
)
def test_who_sends_whom(text, groups):
    found = cost._groups(text)
    assert (found if found is None else found.tolist()) == groups


TEXT = """HloModule m

%one_layer (p0: f32[4,8,8], p1: s32[]) -> f32[8,8] {
  %p0 = f32[4,8,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,8]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,8}
  ROOT %bitcast.1 = f32[8,8]{1,0} bitcast(%slice)
}

%turn (c: (s32[], f32[4,8,8], f32[8,8])) -> (s32[], f32[4,8,8], f32[8,8]) {
  %c = (s32[], f32[4,8,8]{2,1,0}, f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %ws = f32[4,8,8]{2,1,0} get-tuple-element(%c), index=1
  %h = f32[8,8]{1,0} get-tuple-element(%c), index=2
  %w = f32[8,8]{1,0} fusion(%ws, %i), kind=kLoop, calls=%one_layer
  %fast = f32[8,8]{1,0:T(8,128)S(1)} copy(%w)
  %gathered.start = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%half), channel_id=1, replica_groups=[1,2]<=[2]
  %half = f32[4,8]{1,0} bitcast(%w)
  %gathered = f32[8,8]{1,0} all-gather-done(%gathered.start)
  ROOT %next = (s32[], f32[4,8,8]{2,1,0}, f32[8,8]{1,0}) tuple(%i, %ws, %h)
}

%more (c: (s32[], f32[4,8,8], f32[8,8])) -> pred[] {
  %c = (s32[], f32[4,8,8]{2,1,0}, f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %four = s32[]{:T(128)} constant(4)
  ROOT %lt = pred[] compare(%i, %four), direction=LT
}

ENTRY %main (ws: f32[4,8,8], h: f32[8,8]) -> f32[8,8] {
  %ws = f32[4,8,8]{2,1,0} parameter(0)
  %h = f32[8,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8,8]{2,1,0}, f32[8,8]{1,0}) tuple(%zero, %ws, %h)
  %loop = (s32[], f32[4,8,8]{2,1,0}, f32[8,8]{1,0}) while(%start), condition=%more, body=%turn
  ROOT %out = f32[8,8]{1,0} get-tuple-element(%loop), index=2
}
"""


class Compiled:
    def as_text(self) -> str:
        return TEXT


def test_a_text_read_by_hand():
    """Four turns, counted in the condition. A turn reads one layer by its index and writes it, reads it again into
    other memory, and gathers: the operand is read, its alias and the whole are its result; half of the whole comes
    from the other device.
    """
    layer, index = 8 * 8 * 4, 4
    found = cost.traffic(Compiled())
    assert found.messages == {"all-gather": 4 * layer // 2}
    assert found.memory == 4 * ((layer + index + layer) + layer + (layer // 2 + layer // 2 + layer))


def test_sizes_of_shapes():
    size = cost._parse("").size
    assert size("(bf16[2,3]{1,0}, u4[8], pred[])") == 12 + 4 + 1
    assert size("f32[8,128]{1,0:T(8,128)S(1)}") == 0
    assert size("f32[8,128]{1,0:T(8,128)S(1)}", everywhere=True) == 4096
    assert np.isclose(size("f8e4m3fn[16]"), 16)
    assert cost._parse("", frozenset({"u4"})).size("(bf16[2,3]{1,0}, u4[8], pred[])") == 4
