"""The planner on this machine, where its figures can be checked: tiny models, eight CPU devices."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax import cli, machines, models, plan, recipe, weights
from peftax.core import quantization, tree
from peftax.core import sites as core_sites
from peftax.machines import cost
from peftax.train import programs, setup
from tests.machines.cost_test import LLAMA, closed_formula

OVERRIDES = [
    ("method.rank", "8"),
    ("method.targets", "all-linear"),
    ("model.remat", "full"),
    ("data.length", "256"),
    ("train.batch_size", "8"),
]


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


def config_of(model, *overrides):
    return recipe.load("default", [("model.path", model), *OVERRIDES, *overrides]).to_dict()


def test_a_plan_adds_up(model):
    done = plan.plan(config_of(model), machines.named("cpu:8"), tokens=10**6, price=2.0)
    assert set(done.programs) == {"init", "step", "evaluate", "merge"}
    step = done.programs["step"]
    assert done.mesh == {**done.mesh, "fsdp": 8} and done.devices == 8
    assert sum(done.kinds.values()) == step.bytes
    kernels = 3 * (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 704) + 2 * 1024 * 256
    norms = 3 * 2 * 256 + 256
    assert done.total == kernels + norms + done.trainable
    assert done.kinds["base"] == (kernels // 8 + norms) * 4  # split over eight, norms are whole
    assert done.kinds["optimizer"] >= 2 * done.trainable * 4 // 8
    assert done.peak == max(done.programs[name].bytes for name in plan.RUNNING)
    assert done.fits == (done.peak + plan.RESERVE <= done.available)
    wanted = closed_formula(LLAMA, rows=8, length=256, rank=8, remat=True)
    assert abs(step.flops - wanted) < 0.02 * wanted
    # each device gathers 7/8 of every kernel going forward and back; what it makes again may be had otherwise
    layers = kernels - 2 * 1024 * 256
    assert step.messages["all-gather"] >= 4 * 2 * layers * 7 // 8
    assert step.bounds == {} and done.epoch is None  # nobody knows this machine's peaks


def test_seconds_and_cost_at_peaks():
    machine = machines.named("a100-80gb:2")
    step = plan.Program(
        "step", 0, {}, flops=6 * 10**15, traffic=0, packed=0, messages={}, bounds={"compute": 9.6}, compiled=0
    )
    done = plan.Plan("", "", machine.name, 2, {}, 1, 1, {"step": step}, {}, 0, 1, True, tokens=1000)
    found = plan.epoch(done, machine, 10**6, price=1.5)
    hours = 6 * 10**18 / (2 * 3.12e14 * 0.5) / 3600
    assert found["50%"] == {"hours": hours, "device_hours": 2 * hours, "cost": 3 * hours}


def test_members_share_the_base(model):
    """Adapters and their optimizers are there for each; the base is there, and its packed codes are read, once.

    Four members of 128 tokens meet it at once on a CPU (train/population.py's CPU_TOKENS); of 256, in two groups.
    """
    config = config_of(model, ("model.quantize", '(("_proj/kernel$", {"fmt": "nf4", "group": 64}),)'))
    config["train"]["batch_size"], config["data"]["length"] = 1, 128
    one, four = (plan.plan(config, machines.named("cpu:1"), only=("step",), members=n) for n in (1, 4))
    assert four.kinds["base"] == one.kinds["base"]
    assert four.kinds["adapters"] == 4 * one.kinds["adapters"] >= 16 * one.trainable
    assert four.tokens == 4 * one.tokens
    assert abs(four.programs["step"].flops - 4 * one.programs["step"].flops) < 0.01 * four.programs["step"].flops
    with pytest.raises(ValueError, match="members 0: want 1"):
        plan.plan(config, machines.named("cpu:1"), members=0)
    with pytest.raises(ValueError, match="programs merge: the time of 1,000 tokens wants step"):
        plan.plan(config, machines.named("cpu:1"), only=("merge",), tokens=1000)
    assert one.programs["step"].packed <= four.programs["step"].packed < 1.2 * one.programs["step"].packed
    config["data"]["length"] = 256
    groups = plan.plan(config, machines.named("cpu:1"), only=("step",), members=4)
    assert 2 * one.programs["step"].packed <= groups.programs["step"].packed < 2.2 * one.programs["step"].packed


def test_another_programs_operations(model):
    """XLA's own count, which is right where nothing is in a loop: the unrolled model on one device."""
    config = config_of(model, ("model.scan", "False"), ("model.remat", "none"), ("train.chunk", "256"))
    run = plan.sketch(config, machines.named("cpu:1"))
    step = programs.every(run, config)["step"]
    traced = step.run.trace(*step.args)
    xla = traced.lower().compile().cost_analysis()["flops"]
    assert 0.97 < cost.flops(traced) / xla < 1.01  # XLA's has elementwise work too


def test_a_search_ranks_what_fits(model, capsys):
    config = config_of(model)
    tried = plan.search(config, machines.named("cpu:4"), most=2, batches=(1, 2), remats=("full",))
    assert len(tried) == 2 and all(done.fits for _, done in tried)
    assert [plan.differs(config, c)["mesh.fsdp"] for c, _ in tried].count(-1) == 0
    plan.show_search(config, tried, plan.Console(width=200))
    assert "--config.train.batch_size=" in capsys.readouterr().out


def test_a_search_tries_other_bits_and_offloading(model, monkeypatch):
    """Those that make less again are compiled first, of them the config's own bits."""
    seen = []

    def compiled(changed, machine, only):
        seen.append((changed["model"]["remat"], changed["model"]["quantize"]))
        return types.SimpleNamespace(fits=False)

    monkeypatch.setattr(plan, "plan", compiled)
    remats, given = ("full", "offload"), {"batches": (1,), "quantized": plan.BITS[:1]}
    assert plan.search(config_of(model), machines.named("cpu:1"), remats=remats, **given) == []
    assert seen == [(remat, bits) for remat in remats for bits in ((), plan.BITS[0])]


def test_a_search_says_why_nothing_can_be_made(model, capsys):
    given = ["plan", "--config=default", "--topology=cpu:1", f"--config.model.path={model}", "--search"]
    assert cli.main([*given, "--config.method.targets=('q_prj',)"]) == 1
    assert "nearest" in (said := capsys.readouterr().err) and "q_prj" in said
    assert cli.main([*given, "--tokens=1000"]) == 1
    assert "the step of one run" in capsys.readouterr().err


def test_a_search_keeps_the_devices_that_share_a_row(model):
    config = config_of(model, ("mesh.sequence", "2"))
    ((found, done),) = plan.search(config, machines.named("cpu:4"), most=1, batches=(1,), remats=("full",))
    assert done.mesh["sequence"] == 2 and found["train"]["batch_size"] * done.mesh["tensor"] == 2


def test_a_base_that_lies_in_few_bits_is_planned_so(tmp_path):
    config = {**LLAMA, "num_hidden_layers": 1}
    shapes = models.abstract(model := models.build(config))
    sites = core_sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    params = jax.tree.map(lambda x: np.full(x.shape, 0.1, np.float32), shapes)
    packed = quantization.quantize(params, (("_proj/kernel$", {"fmt": "nf4", "group": 64}),), sites)
    weights.save(packed, config, tmp_path / "base")
    sketched = plan.sketch(config_of(str(tmp_path / "base")), machines.named("cpu:1")).base
    assert tree.nbytes(sketched.params) == tree.nbytes(setup.outline(path=str(tmp_path / "base")).params)
    assert sum(map(tree.is_packed, tree.flatten(sketched.params).values())) == 7
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="its weights lie in few bits .bitsandbytes., of which only the files say how"):
        plan.sketch(config_of(str(tmp_path / "base")), machines.named("cpu:1"))


def test_meshes_of_a_machine():
    assert plan.meshes(4) == [
        {"data": 1, "fsdp": 4, "tensor": 1},
        {"data": 1, "fsdp": 2, "tensor": 2},
        {"data": 1, "fsdp": 1, "tensor": 4},
    ]


def test_the_command(model, capsys):
    given = ["plan", "--config=default", "--topology=cpu:1", f"--config.model.path={model}", "--programs", "step"]
    assert cli.main([*given, "--config.data.length=64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"] == "cpu:1" and found["programs"]["step"]["bytes"] == found["peak"] > 0
    assert cli.main([*given[:2], "--topology=cpu:99", *given[3:]]) == 1
    assert "JAX_NUM_CPU_DEVICES=99" in capsys.readouterr().err


def test_a_model_that_nobody_knows(capsys):
    given = ["plan", "--config=default", "--topology=cpu:1", "--config.model.path=meta-llama/Llama-4-8B"]
    assert cli.main(given) == 1
    assert "'meta-llama/Llama-3.1-8B'" in capsys.readouterr().err


@pytest.mark.parametrize("name", [n for n in recipe.shipped() if n.startswith(("llama", "qwen", "mistral"))])
def test_a_machine_that_a_recipe_names_divides_its_batch(name):
    """In shapes: the mesh is the machine's, its batch has a row for each device that shares rows."""
    for machine, pairs in recipe.machines(name).items():
        config = recipe.load(name, on=machine)
        devices = machines.named(machine).count
        tensor = dict(pairs).get("mesh.tensor", "1")
        assert config.train.batch_size % (devices // int(tensor)) == 0
    with pytest.raises(ValueError, match="does not say how to run on 'v4-8'; it names"):
        recipe.load(name, on="v4-8")
    jax.clear_caches()
