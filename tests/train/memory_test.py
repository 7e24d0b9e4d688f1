"""The estimate against what the compiler says that the real step needs; the check before a run."""

import jax
import jax.numpy as jnp
import pytest

from peftax import recipe
from peftax.core import tree
from peftax.train import loop, loss, memory, optimizers, setup
from peftax.train.step import State, make_step
from tests.train import tiny_run

FACTOR = 1.6  # either way; the compiler's own figures for one program differ as much from backend to backend


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_run.base_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr("peftax.sharding.jax.devices", lambda: devices)


def sketch(base, *overrides: str) -> tuple[setup.Run, dict]:
    keys = [("model.path", str(base)), ("data.length", "64"), ("train.batch_size", "8")]
    config = recipe.load("default", keys + [tuple(o.split("=", 1)) for o in overrides]).to_dict()
    return setup.sketch(setup.outline(**config["model"], mesh=config["mesh"]), config["method"]), config


def compiled_bytes(run: setup.Run, config: dict) -> int:
    """What the compiled step of `loop.train` occupies: arguments, outputs that alias none, temporaries."""
    c = config["train"]
    optimizer, _ = optimizers.from_config(
        config["optimizer"], steps=c["steps"], method=run.method, sites=run.base.sites
    )
    state = jax.eval_shape(lambda t: State.create(t, optimizer), run.part.trainable)

    def objective(apply, params, batch, ctx):
        return loss.causal_lm(apply, params, batch, ctx, chunk=c["chunk"])

    dropout = 0 if config["method"].get("dropout") else None
    step = make_step(run.apply, objective, optimizer, accumulate=c["accumulate"], dropout_seed=dropout)
    shape = (c["batch_size"], config["data"]["length"])
    shape = (c["accumulate"], *shape) if c["accumulate"] > 1 else shape
    kinds = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32) | {"weights": jnp.float32}
    batch = {k: jax.ShapeDtypeStruct(shape, kind) for k, kind in kinds.items()}
    m = step.lower(state, tree.abstract(run.part.frozen), batch).compile().memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


CASES = {
    "lora": [],
    "remat": ["model.remat=full"],
    "offload": ["model.remat=offload"],
    "no_remat": ["model.remat=none"],
    "unrolled": ["model.scan=False", "model.remat=none"],
    "packed": ["model.quantize=(('self_attn', {'fmt': 'nf4', 'group': 32}),)"],
    "accumulate": ["train.accumulate=2"],
    "dropout": ["method.dropout=0.1"],
    "full": ["method.name=full"],
    "bfloat16": ["model.dtype=bfloat16", "model.param_dtype=bfloat16"],
    "long": ["data.length=256", "train.batch_size=2"],
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_estimate_against_the_compiled_step(base, overrides):
    run, config = sketch(base, *overrides)
    need, real = memory.estimate(run, config).total, compiled_bytes(run, config)
    assert real / FACTOR < need < real * FACTOR, need / real


def test_kinds(base):
    run, config = sketch(base)
    need = memory.estimate(run, config)
    frozen, trainable = (tree.nbytes(half) for half in run.part)
    assert need.base == tree.nbytes(run.base.params)
    assert need.base + need.adapters == frozen + trainable
    assert need.gradients == trainable
    assert 2 * trainable <= need.optimizer <= 2 * trainable + 64
    assert need.logits == 8 * 64 * run.base.config["vocab_size"] * 4 <= need.temporaries
    assert need.total == sum(getattr(need, kind) for kind in memory.KINDS)


@pytest.mark.parametrize(
    ("override", "less"),
    [
        ("model.remat=full", "activations"),
        ("train.batch_size=4", "activations"),
        ("data.length=32", "temporaries"),
        ("train.chunk=16", "logits"),
        ("model.dtype=bfloat16", "activations"),
        ("model.param_dtype=bfloat16", "base"),
        ("method.rank=2", "optimizer"),
    ],
)
def test_what_it_says_to_change_makes_it_less(base, override, less):
    before, after = (memory.estimate(*sketch(base, *more)) for more in ([], [override]))
    assert getattr(after, less) < 0.8 * getattr(before, less)


def test_what_waits_in_the_hosts_memory(base, monkeypatch):
    """Inputs of layers: on this machine as much as without offloading; on another they are not the device's."""
    full, here = (memory.estimate(*sketch(base, f"model.remat={remat}")) for remat in ("full", "offload"))
    assert here.total == pytest.approx(full.total, rel=1e-3)
    monkeypatch.setattr(memory, "SHARED", ())
    run, config = sketch(base, "model.remat=offload")
    c, tokens = run.base.config, 8 * 64
    inputs = 4 * c["num_hidden_layers"] * tokens * c["hidden_size"]
    assert memory.estimate(run, config).activations == full.activations - inputs


def test_shards(base, monkeypatch):
    run, config = sketch(base)
    whole = memory.estimate(run, config)
    monkeypatch.undo()  # all eight devices
    run, config = sketch(base)
    shared = memory.estimate(run, config)
    assert run.base.mesh.size == 8
    assert shared.activations == pytest.approx(whole.activations / 8, rel=0.1)
    assert whole.base / 8 <= shared.base < whole.base / 4


def test_too_little_is_said_before_the_first_step(base, tmp_path, monkeypatch):
    data = tiny_run.data_file(tmp_path / "data.jsonl")
    config = tiny_run.config(base, data, train__steps="1", data__valid="None")
    need = memory.estimate(*sketch(base, "method.rank=4"))
    monkeypatch.setattr(memory, "available", lambda: need.total - 1)
    with pytest.raises(MemoryError) as error:
        loop.train(config, tmp_path / "run")
    for words in (*memory.KINDS.values(), "train.batch_size=7 instead of 8", "model.remat=full", "check_memory=False"):
        assert words in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    monkeypatch.setattr(memory, "available", lambda: need.total)
    memory.check(*sketch(base, "method.rank=4"))
    monkeypatch.setattr(memory, "available", lambda: 0)
    assert loop.train({**config, "train": {**config["train"], "check_memory": False}}, tmp_path / "run")["step"] == 1


def test_available_is_the_lesser_of_machine_and_group(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:     600 kB\n")
    group = tmp_path / "group"
    assert memory.available(tmp_path / "meminfo", group) == 600 * 1024
    group.mkdir()
    for name, text in {"max": "300000\n", "current": "200000\n", "stat": "anon 5\ninactive_file 50000\n"}.items():
        (group / f"memory.{name}").write_text(text)
    assert memory.available(tmp_path / "meminfo", group) == 150000
    (group / "memory.max").write_text("max\n")
    assert memory.available(tmp_path / "meminfo", group) == 600 * 1024
    assert memory.available(tmp_path / "absent", group) is None


def test_a_device_that_says_its_limit():
    class Device:
        platform, process_index = "gpu", 0

        def __init__(self, stats):
            self.memory_stats = lambda: stats

    class Base:
        class mesh:
            class devices:
                flat = [Device({"bytes_limit": 90}), Device({"bytes_limit": 80}), Device(None)]

    assert memory.free(Base) == 80
    Base.mesh.devices.flat = [Device({})]
    assert memory.free(Base) is None


def test_sizes():
    assert [memory.size(n) for n in (0, 1023, 1536, 3 << 30)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]
