"""Members of a population against their single runs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import tree
from peftax.train import memory, population, programs, setup
from peftax.train.step import State
from tests.train import tiny_run

METHODS = {
    "lora": {"method.rank": "4", "method.dropout": "0.1"},
    "dora": {"method.rank": "4"},
    "vera": {"method.rank": "8"},
    "ia3": {"model.scan": "False"},
    "adapter": {"method.size": "4"},
    "prompt": {"method.length": "4"},
    "oft": {"method.block_size": "4"},
    "ln_tuning": {},
    "adalora": {"method.rank": "4", "method.target_rank": "2", "method.alpha": "300.0"},
    "boft": {"method.block_size": "4", "method.targets": "['q_proj', 'v_proj']"},
    "c3a": {"method.block": "4", "method.targets": "['q_proj', 'v_proj']"},
    "compacter": {"method.size": "8"},
    "fourierft": {"method.frequencies": "60", "method.alpha": "30.0"},
    "full": {},
    "hira": {},
    "hra": {},
    "loha": {"method.rank": "2"},
    "lokr": {},
    "miss": {"method.rank": "4", "method.targets": "['q_proj', 'v_proj']"},
    "p_tuning": {"method.length": "7"},
    "prefix": {},
    "randlora": {"method.rank": "4", "method.alpha": "4.0"},
    "shira": {"method.rank": "4"},
    "vblora": {"method.length": "4", "method.vectors": "16", "method.targets": "['q_proj', 'v_proj']"},
}

QUICK = ("lora", "prompt", "ln_tuning")  # dropout; rows before the tokens; the base's own leaves


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    into = tmp_path_factory.mktemp("population")
    return tiny_run.base_folder(into / "base"), tiny_run.data_file(into / "rows.jsonl")


@pytest.fixture(autouse=True)
def all_at_once(monkeypatch):
    """As on an accelerator."""
    monkeypatch.setattr(population, "CPU_TOKENS", float("inf"))


def config_of(here, name, **more):
    keys = {"method.name": name, **METHODS[name], **{k.replace("__", "."): str(v) for k, v in more.items()}}
    return tiny_run.config(*here, **{k.replace(".", "__"): v for k, v in keys.items()})


def base_of(config):
    """On one device: what compiles quickly."""
    return setup.outline(**config["model"], mesh=config["mesh"], devices=jax.devices()[:1]).load()


def single(base, config, steps):
    """Losses and the trainable leaves of a run by itself."""
    run = setup.start(base, config["method"], seed=config["train"]["init_seed"])
    program = programs.training(run, config)
    own = jax.tree.map(jnp.copy, run.part.trainable)  # a step gives its state away, the base's leaves too
    state = jax.device_put(State.create(own, program.optimizer), program.places)
    batches = setup.train_batches(base, config["data"], batch_size=8, accumulate=config["train"]["accumulate"])
    losses = []
    for _ in range(steps):
        state, metrics = program.step(state, run.part.frozen, next(batches))
        losses.append(float(metrics["loss"]))
    return losses, tree.flatten(state.trainable)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_members_are_their_single_runs(here, name):
    """Unlike rates and seeds (dropout's too), each with its own batches: losses over four steps, and the ways of all
    leaves, which are sums of gradients (SGD, no clipping).
    """
    configs = [
        config_of(
            here,
            name,
            **{"optimizer.name": "sgd", "optimizer.clip": None, "optimizer.learning_rate": rate},
            **{"train.init_seed": i, "data.seed": i, "train.dropout_seed": i},
        )
        for i, rate in enumerate((1e-2, 0.1, 0.3))
    ]
    base = base_of(configs[0])
    members = population.make(base, configs)
    batches = [setup.train_batches(base, c["data"], batch_size=8, accumulate=1) for c in configs]
    began = [tree.flatten(members.member(i).part.trainable) for i in range(3)]
    losses = []
    for _ in range(4):
        rows = [next(b) for b in batches]
        batch = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
        members.state, metrics = members.step(
            members.rates, members.seeds, members.state, members.theta, batch, members.base
        )
        losses.append(np.asarray(metrics["loss"]))
    for i, config in enumerate(configs):
        alone, leaves = single(base, config, 4)
        np.testing.assert_allclose([x[i] for x in losses], alone, rtol=1e-5)
        for path, x in tree.flatten(members.member(i).part.trainable).items():
            off = np.linalg.norm(x - leaves[path]) / max(np.linalg.norm(leaves[path] - began[i][path]), 1e-12)
            assert off < 1e-4, (path, off)


def test_ranks_and_alphas_in_one_program(here):
    """Ranks 2, 4 and 8, padded with zeros that stay: AdamW's losses are the single runs'."""
    shapes = ((2, 4.0), (4, 32.0), (8, 8.0))
    configs = [config_of(here, "lora", method__rank=r, method__alpha=a, method__dropout=0.0) for r, a in shapes]
    base = base_of(configs[0])
    members = population.make(base, configs, shared_batch=True)
    batches = setup.train_batches(base, configs[0]["data"], batch_size=8, accumulate=1)
    losses = []
    for _ in range(4):
        members.state, metrics = members.step(
            members.rates, members.seeds, members.state, members.theta, next(batches), members.base
        )
        losses.append(np.asarray(metrics["loss"]))
    assert members.step._cache_size() == 1
    for i, (rank, _) in enumerate(shapes):
        alone, leaves = single(base, configs[i], 4)
        np.testing.assert_allclose([x[i] for x in losses], alone, rtol=1e-5)
        mine = tree.flatten(members.member(i).part.trainable)
        for path, x in leaves.items():
            assert mine[path].shape == x.shape
        for path, x in tree.flatten(members.state.trainable).items():
            beyond = x[i, :, :, rank:] if path.endswith("/a") else x[i, :, rank:]
            assert not beyond.any(), path


@pytest.mark.parametrize("shared", [pytest.param(True, marks=pytest.mark.slow), False])
def test_groups_of_members_take_the_same_steps(here, monkeypatch, shared):
    """Four members, two at a time, as all at once: losses and leaves of two steps, dropout's too."""
    configs = [
        config_of(here, "lora", **{"optimizer.learning_rate": rate, "train.dropout_seed": i, "data.seed": i})
        for i, rate in enumerate((1e-3, 1e-2, 3e-2, 0.1))
    ]
    base = base_of(configs[0])
    batches = [setup.train_batches(base, c["data"], batch_size=8, accumulate=1) for c in configs]
    steps = [[next(b) for b in batches] for _ in range(2)]
    found = {}
    for most in (float("inf"), 2 * steps[0][0]["tokens"].size):
        monkeypatch.setattr(population, "CPU_TOKENS", most)
        members, losses = population.make(base, configs, shared_batch=shared), []
        for rows in steps:
            batch = rows[0] if shared else {k: np.stack([r[k] for r in rows]) for k in rows[0]}
            members.state, metrics = members.step(
                members.rates, members.seeds, members.state, members.theta, batch, members.base
            )
            losses.append(metrics["loss"])
        found[most] = np.asarray(losses), members.state.trainable
    (losses, leaves), (in_turn, also) = found.values()
    np.testing.assert_allclose(in_turn, losses, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, atol=1e-5), leaves, also)


@pytest.mark.parametrize("most, groups", [(8, 6), (15, 6), (20, 3), (36, 2), (60, None)])
def test_as_many_members_meet_the_base_at_once_as_divide_them(most, groups):
    """Six members of ten tokens each."""

    def one(rate, seed, state, theta, batch, frozen):
        return state + rate * theta, {"loss": batch["tokens"].sum() * frozen}

    step = population._in_turn(one, (0, 0, 0, 0, 0, None), 6, most)
    many = jnp.ones(6)
    text = str(jax.make_jaxpr(step)(many, many, many, many, {"tokens": jnp.ones((6, 2, 5))}, 1.0))
    assert f"length={groups}" in text if groups else "scan" not in text


@pytest.mark.parametrize("name", ["dora", *(pytest.param(n, marks=pytest.mark.slow) for n in ("hira", "loha"))])
def test_zeros_behind_a_rank_stay_zeros(here, name):
    more = {} if name == "dora" else {"method__name": name}
    configs = [config_of(here, "dora", **more, method__rank=r) for r in (2, 4)]
    base = base_of(configs[0])
    members = population.make(base, configs, shared_batch=True)
    key = jax.random.key(0)
    for i in range(2):  # off the start, where some slopes are zero for everybody
        noise = lambda x, i=i: x.at[i].add(0.1 * jax.random.normal(key, x[i].shape) * (x[i] != 0))  # noqa: E731
        members.state = members.state.replace(trainable=jax.tree.map(noise, members.state.trainable))
    before = jax.tree.map(jnp.copy, members.state.trainable)
    batches = setup.train_batches(base, configs[0]["data"], batch_size=8, accumulate=1)
    for _ in range(3):
        members.state, _ = members.step(
            members.rates, members.seeds, members.state, members.theta, next(batches), members.base
        )
    small = tree.flatten(members.runs[0].part.trainable)
    for path, x in tree.flatten(members.state.trainable).items():
        own = jnp.zeros(x[0].shape, bool).at[tuple(slice(n) for n in small[path].shape)].set(True)
        assert not x[0][~own].any(), path
        assert (x[1] != tree.flatten(before)[path][1]).any(), path


@pytest.mark.parametrize(
    "change, says",
    [
        ({"train__batch_size": 16}, "they differ in train.batch_size: 8 and 16"),
        ({"method__rank": 2}, "they differ in method.rank: 8 and 2"),
        ({"method__name": "lora"}, "they differ in method."),
    ],
)
def test_what_cannot_be_together_says_why(here, change, says):
    configs = [config_of(here, "vera"), config_of(here, "vera", **change)]
    base = base_of(configs[0])
    with pytest.raises(ValueError, match=says):
        population.make(base, configs)
    moved = config_of(here, "lora", method__init="pissa")
    assert "moves" in population.together([moved, moved])
    chain = {"name": "prefix+lora", "prefix": {}, "lora": {"init": "pissa"}}
    assert "moves" in population.together([{**moved, "method": chain}])


def test_the_base_is_read_in_one_product(here):
    """Members of one base: its kernels meet all members' rows in one product; no kernel is copied for each."""
    configs = [config_of(here, "lora", optimizer__learning_rate=r, method__dropout=0.0) for r in (1e-3, 1e-2)]
    base = base_of(configs[0])
    members = population.make(base, configs, shared_batch=True)
    batches = setup.train_batches(base, configs[0]["data"], batch_size=8, accumulate=1)
    args = (members.rates, members.seeds, members.state, members.theta, next(batches), members.base)
    kernel = tree.flatten(base.params)["model/layers/mlp/up_proj/kernel"]
    two_of_them = f"f32[2,{kernel.shape[-2]},{kernel.shape[-1]}]"
    assert two_of_them not in members.step.lower(*args).as_text("hlo").replace(
        f"f32[{','.join(map(str, kernel.shape))}]", ""
    )


def test_the_optimizers_state_changes_in_place(here):
    """None of it is copied first."""
    configs = [config_of(here, "lora", optimizer__learning_rate=r) for r in (1e-3, 1e-2)]
    base = setup.outline(**configs[0]["model"], mesh=configs[0]["mesh"], devices=jax.devices()[:1])
    program = population.program(base, configs)
    lines = program.run.lower(*program.args).compile().as_text().splitlines()
    state = {line.split()[0] for line in lines if "parameter(" in line and "opt_state" in line}
    copied = {of for line in lines for of in re.findall(r" copy\((%[\w.]+)\)", line)}
    assert len(state) > 2 * 14 and not state & copied


def test_members_that_failed_fail_again(here, tmp_path, monkeypatch):
    """Told to try again they stand where they stood and say so again; a recipe that has changed since is refused."""
    configs = [config_of(here, "lora", optimizer__learning_rate=rate) for rate in (2e38, 3e38)]
    outline = setup.outline
    monkeypatch.setattr(setup, "outline", lambda **how: outline(**how, devices=jax.devices()[:1]))
    folders = [tmp_path / "a", tmp_path / "b"]
    for _ in range(2):
        assert population.train(configs, folders, tmp_path / "both") == [None, None]
        for folder in folders:
            assert "is not finite" in (folder / "error.txt").read_text()
            (folder / "error.txt").unlink()
    other = [{**config, "optimizer": {**config["optimizer"], "weight_decay": 0.5}} for config in configs]
    with pytest.raises(ValueError, match=r"a holds a run of another config: optimizer\.weight_decay is"):
        population.train(other, folders, tmp_path / "both")


def test_a_mesh_that_does_not_divide_the_rows(here, tmp_path):
    """As a single run says it, before anything is written."""
    configs = [config_of(here, "lora", mesh__data=8, train__batch_size=6, optimizer__learning_rate=r) for r in (1, 2)]
    with pytest.raises(ValueError, match=r"train\.batch_size.* 6 is not divided by the mesh's data=8"):
        population.train(configs, [tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("most", [float("inf"), 8 * 64])
def test_memory_is_estimated_as_the_compiler_has_it(here, monkeypatch, most):
    """Also where members take turns: what only those need who compute is there once."""
    monkeypatch.setattr(population, "CPU_TOKENS", most)
    configs = [config_of(here, "lora", method__rank=rank) for rank in (2, 16, 4, 8)]
    base = setup.outline(**configs[0]["model"], mesh=configs[0]["mesh"], devices=jax.devices()[:1])
    need, program = population.check_memory(base, configs).total, population.program(base, configs)
    real = program.run.lower(*program.args).compile().memory_analysis()
    real = real.argument_size_in_bytes + real.output_size_in_bytes - real.alias_size_in_bytes + real.temp_size_in_bytes
    assert real / 1.6 < need < 1.6 * real, need / real


def test_too_little_memory_is_said_before_weights_are_read(here, tmp_path, monkeypatch):
    configs = [config_of(here, "lora", optimizer__learning_rate=rate) for rate in (1e-3, 3e-3, 1e-2)]
    outline = setup.outline
    monkeypatch.setattr(setup, "outline", lambda **how: outline(**how, devices=jax.devices()[:1]))
    base = setup.outline(**configs[0]["model"], mesh=configs[0]["mesh"])
    one, three = (population.check_memory(base, configs[:n]) for n in (1, 3))
    assert one.base == three.base and 3 * one.optimizer == three.optimizer
    monkeypatch.setattr(memory, "available", lambda: three.total - 1)
    says = r"a training step of 3 members needs .* Give it members that are fewer: peftax sweep --together=2; or"
    with pytest.raises(MemoryError, match=says):
        population.train(configs, [tmp_path / name for name in "abc"], tmp_path / "all")
    assert not list(tmp_path.iterdir())


def test_as_many_members_as_it_says_do_fit(here, monkeypatch):
    """Also where they take turns, so that what is needed does not grow in step with them; none: as a single run."""
    monkeypatch.setattr(population, "CPU_TOKENS", 8 * 64)
    configs = [config_of(here, "lora", optimizer__learning_rate=10**-n) for n in range(1, 9)]
    base = setup.outline(**configs[0]["model"], mesh=configs[0]["mesh"], devices=jax.devices()[:1])
    needs = [population.check_memory(base, configs[:n]).total for n in range(1, 9)]
    for there, fits in ((needs[4], 5), (needs[5] - 1, 5), (needs[0], 1)):
        monkeypatch.setattr(memory, "available", lambda there=there: there)
        with pytest.raises(MemoryError, match=f"--together={fits}; or"):
            population.check_memory(base, configs)
        population.check_memory(base, configs[:fits])
    monkeypatch.setattr(memory, "available", lambda: needs[0] - 1)
    with pytest.raises(MemoryError, match=r"step of 8 members .*Give it config\.train\.batch_size=7 instead of 8"):
        population.check_memory(base, configs)
