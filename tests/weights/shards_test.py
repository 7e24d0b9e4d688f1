"""Leaves laid on their devices layer by layer: the same numbers and bits, and little of them on the host at a time."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from peftax import models, sharding, weights
from peftax.core import quantization, sites, tree
from peftax.weights import base

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
MODEL = models.build(CONFIG)
SHAPES = models.abstract(MODEL)
SITES = sites.find(MODEL.apply, SHAPES, jax.ShapeDtypeStruct((1, 2), jnp.int32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), SHAPES)
    return weights.save(params, CONFIG, tmp_path_factory.mktemp("shards") / "base")


def places(shapes, grid):
    specs = sharding.base_specs(SHAPES, SITES, grid)
    return tree.unflatten({p: sharding.of_leaf(x, specs[p], grid) for p, x in tree.flatten(shapes).items()})


FORMATS = {
    "dense": None,
    "nf4": {"fmt": "nf4", "group": 32, "double": True},
    "q4_1": {"fmt": "q4_1"},
    "int8": {"fmt": "int8"},
}


@pytest.mark.parametrize("grid", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 1, "tensor": 4}])
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_same_layer_by_layer(folder, monkeypatch, fmt, grid):
    """Also where a part of K cuts a group (192 rows over 8 devices: 24 each), and where runs of rows are read."""
    rules = (("_proj/kernel$", FORMATS[fmt]),)
    shapes = quantization.quantize(SHAPES, rules if FORMATS[fmt] else (), SITES)
    at_once = weights.load(folder, shapes)
    monkeypatch.setattr(base, "TOGETHER", 0)
    monkeypatch.setattr(base, "SLAB", 4096)
    lies = places(shapes, sharding.make_mesh(**grid))
    parted = weights.load(folder, shapes, shardings=lies)
    jax.tree.map(np.testing.assert_array_equal, parted, at_once)
    jax.tree.map(lambda x, at: x.sharding.is_equivalent_to(at, x.ndim) or pytest.fail(f"{x.sharding}"), parted, lies)


def test_packing_reads_a_process_s_own_shards(folder, monkeypatch):
    """Each number once, although four devices want it: two parts of rows, each for one half of a tensor."""
    shapes = quantization.quantize(SHAPES, (("up_proj/kernel$", {"fmt": "nf4", "group": 32, "double": True}),), SITES)
    found, read = weights.open(folder), []
    real = found.read

    def watched(name, *, index=None):
        part = real(name, index=index)
        read.append((name, part.shape))
        return part

    monkeypatch.setattr(found, "read", watched)
    monkeypatch.setattr(base, "TOGETHER", 0)
    weights.load(found, shapes, shardings=places(shapes, sharding.make_mesh(data=4, fsdp=2)))
    up = [shape for name, shape in read if name == "model.layers.0.mlp.up_proj.weight"]
    assert up == [(96, 64)] * 2  # [out, in] in the file


START = """
import json, sys, threading, time
import jax, jax.numpy as jnp
from peftax import models, weights, sharding
from peftax.core import quantization, sites, tree
folder, rules, grid = json.loads(sys.argv[1])
config = json.load(open(folder + "/config.json"))
model = models.build(config, param_dtype="bfloat16")
shapes = models.abstract(model)
found = sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32))
mesh = sharding.make_mesh(**grid)
specs = sharding.base_specs(shapes, found, mesh)
shapes = quantization.quantize(shapes, rules, found)
lies = {p: sharding.of_leaf(x, specs[p], mesh) for p, x in tree.flatten(shapes).items()}

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

def load():
    return weights.load(folder, shapes, shardings=tree.unflatten(lies))

jnp.zeros(8).block_until_ready()
before = anonymous()
watcher = threading.Thread(target=watch)
"""
LOAD = """
watcher.start()
params = load()
"""
MERGE = """
from peftax import methods
from peftax.core import folding
params = load()
method = methods.make("lora", rank=4, targets="all-linear")
part = method.init(jax.random.key(0), params, found)
watcher.start()
shapes, read = folding.by_layer(method, tree.merge(*part), found)
weights.save(shapes, config, folder + "-folded", read=read)
"""
END = """
done = True
watcher.join()
held = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
print(json.dumps({"peak": peak - before, "held": held, "after": anonymous() - before}))
"""


def written(folder, hidden, wide, layers):
    """A checkpoint of Llama 70B's proportions with made-up numbers, a file a layer; the bytes of its largest tensor."""
    import ml_dtypes

    folder.mkdir()
    config = {**CONFIG, "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers}
    config |= {"num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 1024, "vocab_size": 1024}
    rng, index = np.random.default_rng(0), {}
    draw = rng.integers(0, 2**13, wide * hidden, np.uint16) + np.uint16(0x3C00)  # bf16 from 2^-7 up
    sizes = {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
    sizes |= {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    sizes |= {f"self_attn.{x}_proj": (hidden // 8, hidden) for x in "kv"}
    sizes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    files = [{f"model.layers.{i}.{name}.weight": size for name, size in sizes.items()} for i in range(layers)]
    files.append({"model.norm.weight": (hidden,), "model.embed_tokens.weight": (1024, hidden)})
    files[-1]["lm_head.weight"] = (1024, hidden)
    for i, tensors in enumerate(files):
        file = f"model-{i}.safetensors"
        made = {n: draw[: int(np.prod(s))].view(ml_dtypes.bfloat16).reshape(s) for n, s in tensors.items()}
        save_file(made, folder / file)
        index |= dict.fromkeys(made, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))
    return 2 * wide * hidden


def measured(folder, rules, grid, what=LOAD):
    """A load, or a merge, in a process of its own: bytes of anonymous memory at its peak, and of the arrays."""
    args = json.dumps([str(folder), rules, grid])
    done = subprocess.run([sys.executable, "-c", START + what + END, args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
NF4 = [["_proj/kernel$", {"fmt": "nf4", "group": 64, "double": True}]]


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("rules", [[], NF4], ids=["dense", "nf4"])
def test_70b_shapes_take_less_than_two_tensors_of_the_host(tmp_path, rules):
    """Llama-3.1-70B's shapes, two layers, a small vocabulary: beyond what the arrays hold less than two tensors."""
    tensor = written(tmp_path / "base", 8192, 28672, 2)
    for grid in ({"fsdp": 8}, {"fsdp": 2, "tensor": 4}):
        found = measured(tmp_path / "base", rules, grid)
        print(rules and "nf4", grid, {k: f"{v / 2**20:,.0f} MiB" for k, v in {**found, "tensor": tensor}.items()})
        assert found["peak"] < found["held"] + 2 * tensor


@LINUX
@pytest.mark.slow
def test_a_merge_holds_the_base_and_one_kernel(tmp_path):
    """Eight layers of Llama-3.1-8B's shapes in NF4: a few copies of one kernel in f32, not the folded model."""
    tensor = written(tmp_path / "base", 4096, 14336, 8)
    found = measured(tmp_path / "base", NF4, {"fsdp": -1}, MERGE)
    print({k: f"{v / 2**20:,.0f} MiB" for k, v in {**found, "tensor": tensor}.items()})
    assert found["peak"] < found["held"] + 7 * 2 * tensor  # of two bytes; the model is 30
