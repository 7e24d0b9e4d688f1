"""Sweeps that grow until their choices can be trusted. Training is a formula here; tests/sweep_test.py trains."""

import json
import math
from pathlib import Path

import jax
import pytest

from peftax import cli, report, results, selection, sweep
from peftax.engines import local
from peftax.results import RATE, Choice
from tests.train import tiny_run

RECIPE = """
from peftax.configs import default

get_config = default.get_config


def sweep(add):
    for rank in (2, 4):
        for rate in {rates}:
            for seed in range({seeds}):
                add({{"method.rank": rank, "optimizer.learning_rate": rate, "seed": seed}})
"""
BEST = {2: 1e-3, 4: 0.2}  # the rate that is best for each rank; above 1 a run diverges


@pytest.fixture
def began(monkeypatch):
    """An engine whose members end at once, better the nearer they are to their rank's best rate; what it began."""
    names = []

    def submit(members, workdir, *, jobs=1):
        for folder in [sweep.Path(word) for command in members.values() for word in command[3:]]:
            own = dict(json.loads((folder / "member.json").read_text())["overrides"])
            rate = float(own.get(RATE, 0.01))
            valid = 1 + abs(math.log10(rate / BEST[int(own["method.rank"])])) + int(own.get("data.seed", 0)) / 100
            lines = [{"step": 0, "valid_nll": 9.0}, {"step": 1, "valid_nll": valid}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
            if rate > 1:
                (folder / "error.txt").write_text("FloatingPointError: loss nan is not finite\n")
            else:
                result = {
                    "step": 1,
                    "valid": valid,
                    "best": [1, valid],
                    "seconds": 1.0,
                    "peak_bytes": 1,
                    "trainable": 2,
                }
                (folder / "result.json").write_text(json.dumps(result))
            names.append(folder.name)

    monkeypatch.setattr("peftax.engines.local.submit", submit)
    return names


def recipe_file(folder, *, rates="(0.001, 0.003, 0.01)", seeds=1):
    file = folder / "recipe.py"
    file.write_text(RECIPE.format(rates=rates, seeds=seeds))
    return str(file)


def grid(workdir):
    return {c.arm["method.rank"]: (list(c.rates), c.edge, c.trials) for c in selection.choices(workdir)}


@pytest.mark.parametrize(
    "rates, edge, best, wanted",
    [
        ({1e-3: 1.0, 3e-3: 2.0, 1e-2: 3.0}, "low", 1e-3, 3.33e-4),
        ({1e-3: 3.0, 3e-3: 2.0, 1e-2: 1.0}, "high", 1e-2, 3.33e-2),
        ({1e-3: 2.0, 1e-2: 1.0, 1e-1: 3.0}, "", 1e-2, 3.16e-3),
        ({1e-3: math.inf, 1e-2: 1.0, 1e-1: 3.0}, "", 1e-2, 3.16e-2),
        ({0.1: 2.0, 0.1005: 1.0, 0.101: 3.0}, "", 0.1005, None),  # three digits tell no more apart
        ({1e-3: 1.0}, "only", 1e-3, None),
        ({0.0: 1.0, 1e-3: 2.0}, "low", 0.0, None),
    ],
)
def test_the_next_rate(rates, edge, best, wanted):
    assert selection.next_rate(Choice({}, best, 0.0, [], rates, edge, 3, [])) == wanted


def test_grids_grow_until_all_are_inside(tmp_path, began):
    """Rank 2's best rate is the lowest, rank 4's lies far above: both have as many trials in the end."""
    file, workdir = recipe_file(tmp_path), tmp_path / "w"
    found = selection.run(file, workdir)
    assert grid(workdir) == {
        2: ([3.33e-4, 1e-3, 1.32e-3, 1.73e-3, 3e-3, 1e-2], "", 6),
        4: ([1e-3, 3e-3, 1e-2, 3.33e-2, 0.111, 0.37], "", 6),
    }
    assert set(found.values()) == {"finished"} and len(began) == len(found) == 12
    assert {f.name for f in found} == {f.parent.name for f in workdir.glob("*/member.json")}
    assert sweep.said(workdir)["members"] == [f.name for f in found] and len(sweep.said(workdir)["rounds"]) == 3
    assert selection.run(file, workdir) == found and len(began) == 12  # what is finished is not run again
    assert cli.main(["sweep", f"--config={file}", f"--workdir={workdir}", "--dry"]) == 0

    began.clear()  # a seed more for all, the added rates too
    selection.run(recipe_file(tmp_path, seeds=2), workdir)
    assert len(began) == 12 and all(name.endswith("seed=1") for name in began)
    assert {trials for *_, trials in grid(workdir).values()} == {12}


def test_what_is_chosen_gets_more_seeds(tmp_path, began):
    """They are counted in its mean, and take no part in the choice: seed 300 is so bad that the others would win."""
    file, workdir = recipe_file(tmp_path), tmp_path / "w"
    selection.run(file, workdir, extend=1)
    once, first = grid(workdir), set(began)
    found = selection.run(file, workdir, extend=1, seeds=(1, 300))
    assert grid(workdir) == once and set(found.values()) == {"finished"}
    at = {2: "0.001", 4: "0.0333"}
    more = {f"rank={r},learning_rate={at[r]},seed={seed}" for r in at for seed in (1, 300)}
    assert set(began) - first == more and len(began) == len(found) == len(first) + 4
    for c in selection.choices(workdir):
        apart = abs(math.log10(c.rate / BEST[c.arm["method.rank"]]))
        assert len(c.members) == 3 and c.seeds == pytest.approx([1 + apart, 1.01 + apart, 4 + apart])
        assert c.valid == pytest.approx(2.0033 + apart, abs=1e-4) and c.rates[c.rate] == pytest.approx(1 + apart)
    assert selection.run(file, workdir, extend=1, seeds=(1, 300)) == found and len(began) == len(found)
    assert selection.run(file, workdir, extend=1) == found  # they stay


def test_seeds_of_a_recipe_that_sweeps_neither_seeds_nor_rates(tmp_path, began):
    file, workdir = tmp_path / "recipe.py", tmp_path / "w"
    sweep_ = 'def sweep(add):\n    for rank in (2, 4):\n        add({"method.rank": rank, "data.length": 64})\n'
    text = "    config.optimizer.learning_rate = 0.01\n    return config\n\n\n"
    head = "from peftax.configs import default\n\n\ndef get_config():\n    config = default.get_config()\n"
    file.write_text(head + text + sweep_)
    names = [f.name for f in sweep.lay_out(str(file), workdir)]
    assert names == ["rank=2,length=64", "rank=4,length=64"]
    found = selection.run(str(file), workdir, seeds=(0, 1, 2))  # 0 is what they have
    assert {f.name for f in found} == {*names, *(f"{name},seed={s}" for name in names for s in (1, 2))}
    assert [c.members for c in selection.choices(workdir)] == [[n, f"{n},seed=1", f"{n},seed=2"] for n in names]


def test_seeds_beside_a_swept_seed_are_runs_of_their_own(tmp_path, began):
    """data.seed 0 and 1 are swept; seeds 1 and 2 of all are two runs more, each once, and none of the choice."""
    file, workdir = tmp_path / "recipe.py", tmp_path / "w"
    text = RECIPE.format(rates="(0.001, 0.003)", seeds=2).replace('"seed": seed', '"data.seed": seed')
    file.write_text(text.replace("(2, 4)", "(2,)"))
    selection.run(str(file), workdir, extend=0)
    (before,) = selection.choices(workdir)
    selection.run(str(file), workdir, extend=0, seeds=(0, 1, 2))
    (after,) = selection.choices(workdir)
    assert len(began) == 6 and after.rates == before.rates and after.trials == before.trials == 4
    assert len(after.members) == 4 and {n.rpartition(",")[2] for n in after.members} == {
        *("seed=0", "seed=1", "seeds=1", "seeds=2")
    }


def test_arms_that_the_recipe_has_no_longer(tmp_path, began):
    """They ask for nothing more."""
    file, workdir = recipe_file(tmp_path), tmp_path / "w"
    selection.run(file, workdir, extend=0)
    began.clear()
    Path(file).write_text(Path(file).read_text().replace("(2, 4)", "(4,)"))
    selection.run(file, workdir, extend=1)
    assert began == ["rank=4,learning_rate=0.0333,seed=0"] and [c.arm for c in selection.choices(workdir)] == [
        {"method.rank": 4}
    ]


def test_where_the_limit_ends_it_the_report_says_so(tmp_path, began, capsys):
    file, workdir = recipe_file(tmp_path), tmp_path / "w"
    command = ["sweep", f"--config={file}", f"--workdir={workdir}"]
    assert cli.main([*command, "--extend=0"]) == 0 and len(began) == 6
    assert cli.main([*command, "--extend=1"]) == 0 and len(began) == 8
    assert grid(workdir)[2][1] == "" and grid(workdir)[4][1] == "high"
    told = capsys.readouterr()
    assert told.out.count("finished") == 14 and "rank 4: learning rate 0.0333 is still at the edge" in told.err
    text = report.write(workdir).with_name("report.md").read_text()
    assert "still at the edge: the highest" in text and "| inside |" in text


def test_what_diverges_is_an_edge_too_far(tmp_path, began):
    """Rank 4's grid begins where all diverges: it grows down; a rate that failed is no best one."""
    file, workdir = recipe_file(tmp_path, rates="(2.0, 4.0)"), tmp_path / "w"
    selection.run(file, workdir, extend=2)
    assert grid(workdir)[4] == ([0.5, 1.0, 2.0, 4.0], "low", 4)
    assert results.load(workdir).status.value_counts().to_dict() == {"failed": 4, "finished": 4}


def test_an_engine_that_does_not_wait(tmp_path, began, monkeypatch):
    """The next call of the same command goes on, a round at a time."""
    file, workdir = recipe_file(tmp_path), tmp_path / "w"
    ends = local.submit
    queued = []
    monkeypatch.setattr("peftax.engines.local.submit", lambda members, workdir, jobs=1: queued.append(members))
    for expected in (6, 8, 10, 12):
        found = selection.run(file, workdir)
        assert len(found) == expected and list(found.values()).count("waiting") == (6 if expected == 6 else 2)
        assert len(selection.run(file, workdir)) == expected  # nothing has ended: nothing new
        ends(queued[-1], workdir)
    assert set(selection.run(file, workdir).values()) == {"finished"}
    assert len(sweep.said(workdir)["rounds"]) == 3


TINY = """
from pathlib import Path
from peftax.configs import default

HERE = Path(__file__).parent


def get_config():
    config = default.get_config()
    config.model.path = str(HERE / "base")
    config.data.test = config.data.train = config.data.valid = str(HERE / "rows.jsonl")
    config.data.length = 64
    config.method.rank = 2
    config.train.steps = 2
    config.train.batch_size = 8
    config.train.tensorboard = False
    return config


def sweep(add):
    for rate in (0.001, 0.01):
        for seed in range({seeds}):
            add({{"optimizer.learning_rate": rate, "seed": seed}})
"""


class _Here:
    """A process of the local engine that has run in this one."""

    def __init__(self, command):
        sweep.main(*command[3:])

    def poll(self):
        return 0


def test_test_is_read_once_and_other_data_afterwards(tmp_path, monkeypatch, capsys):
    """A real sweep: read when it is finished, measured later, and a cell that is chosen later is read too."""
    devices = jax.devices()[:1]
    monkeypatch.setattr("peftax.sharding.jax.devices", lambda: devices)
    monkeypatch.setattr("peftax.engines.local._start", lambda command, folder, cores: _Here(command))
    tiny_run.base_folder(tmp_path / "base")
    tiny_run.data_file(tmp_path / "rows.jsonl")
    file, workdir = tmp_path / "tiny.py", tmp_path / "w"
    file.write_text(TINY.format(seeds=1))
    command = ["sweep", f"--config={file}", f"--workdir={workdir}", "--extend=0"]
    assert cli.main(command) == 0
    low, high = sorted(workdir.glob("learning_rate=*"))
    assert (high / "test.json").exists() and not (low / "test.json").exists()
    assert json.loads((high / "test.json").read_text())["nll"] == pytest.approx(
        json.loads((high / "result.json").read_text())["valid"], rel=1e-4
    )  # the same rows here

    (tmp_path / "words.jsonl").write_text(json.dumps({"text": "add 3 and 4, then 5 and 6"}) + "\n")
    before = {f: f.read_bytes() for f in workdir.glob("learning_rate=*/*.json")}
    assert cli.main([*command, f"--measure=general={tmp_path / 'words.jsonl'}"]) == 0
    assert {f: f.read_bytes() for f in before} == before
    table = results.load(workdir)
    assert table["metrics.general before"].nunique() == 1 and table["metrics.general"].nunique() == 2
    assert len(list(workdir.glob("bases/*.json"))) == 1
    with pytest.raises(ValueError, match="general is measured on"):
        selection.run(str(file), workdir, measures={"general": "prose"})
    assert cli.main([*command, "--measure=gone=no/such/hub_name"]) == 1
    assert capsys.readouterr().out.count("gone: ValueError: cannot load split 'test' of no/such/hub_name") == 2

    for folder, valid in ((low, 0.1), (high, 9.0)):  # as if more seeds had turned the choice
        result = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps({**result, "best": [2, valid]}))
    read = (high / "test.json").read_bytes()
    sweep.say(workdir, measures={})
    assert cli.main(command) == 0
    assert (low / "test.json").exists() and (high / "test.json").read_bytes() == read
    assert [(c.read, c.rate) for c in selection.choices(workdir)] == [(2, 0.001)]
    file.write_text(file.read_text().replace("config.data.test = ", "config.data.test_limit = 3; config.data.test = "))
    with pytest.raises(ValueError, match="the recipe says .* now; test is read once"):
        selection.run(str(file), workdir, extend=0)


def test_without_valid_there_is_no_choice(tmp_path, began):
    file, workdir = recipe_file(tmp_path), tmp_path / "w"
    for folder in sweep.lay_out(file, workdir):
        (folder / "result.json").write_text(json.dumps({"step": 1, "valid": None, "best": [1, None]}))
    assert len(selection.run(file, workdir)) == 6 and selection.choices(workdir) == []
    with pytest.raises(ValueError, match="none is chosen for more seeds; give config.data.valid"):
        selection.run(file, workdir, seeds=(1,))
    with pytest.raises(ValueError, match="seeds: -1 must be at least 0"):
        selection.run(file, workdir, seeds=(1, -1))
