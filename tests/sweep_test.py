"""A sweep of six tiny runs: laid out, run, killed, failed, added to, read."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peftax import cli, results, sweep
from peftax.train import evaluate
from tests.train import tiny_run

RECIPE = """
from pathlib import Path
from peftax.configs import default

HERE = Path(__file__).parent
RATES = {rates}


def get_config():
    config = default.get_config()
    config.model.path = str(HERE / "base")
    config.data.train = config.data.valid = str(HERE / "rows.jsonl")
    config.data.length = 64
    config.train.steps = {steps}
    config.train.batch_size = 8
    config.train.eval_every = config.train.save_every = 2
    config.train.tensorboard = False
    return config


def sweep(add):
    for name, more in (("lora", {{"method.rank": 2}}), ("ia3", {{}})):
        for rate in RATES:
            add({{"method.name": name, **more, "optimizer.learning_rate": rate, "seed": 0}})
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    into = tmp_path_factory.mktemp("sweep")
    tiny_run.base_folder(into / "base")
    tiny_run.data_file(into / "rows.jsonl")
    return into


def recipe_file(here: Path, name: str, *, rates: str = "(0.001, 0.01, 0.1)", steps: int = 4) -> str:
    file = here / f"{name}.py"
    file.write_text(RECIPE.format(rates=rates, steps=steps))
    return str(file)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))


def test_members_and_their_names(here):
    found = sweep.members(recipe_file(here, "names"), [("train.steps", "3")])
    assert list(found)[:2] == [
        "name=lora,rank=2,learning_rate=0.001,seed=0",
        "name=lora,rank=2,learning_rate=0.01,seed=0",
    ]
    assert found["name=ia3,learning_rate=0.1,seed=0"] == [
        *[("train.steps", "3"), ("method.name", "ia3"), ("optimizer.learning_rate", "0.1")],
        *[(key, "0") for key in sweep.SEEDS],
    ]


def test_a_name_that_would_be_too_long_is_cut_and_stays_one():
    short = {"a": "a", "b": "b"}
    one, other = (sweep.member_name({"a": "x" * 150, "b": n}, short) for n in (1, 2))
    assert len(one) == sweep.LONG and one != other


def test_keys_that_end_alike_are_said_whole():
    assert sweep.short_names({"data.seed", "train.init_seed", "train.seed"}) == {
        "data.seed": "data.seed",
        "train.seed": "train.seed",
        "train.init_seed": "init_seed",
    }


@pytest.mark.parametrize(
    "text, says",
    [
        ("def sweep(add): pass", "adds no member"),
        ("def sweep(add):\n  add({'method.rank': 1})\n  add({'method.rank': 1})", "adds rank=1 twice"),
        ("def sweep(add): add({'method.rnk': 1})", "rnk=1: config has no key 'method.rnk'; the nearest: 'method.rank'"),
        ("", r"has no sweep\(add\)"),
    ],
)
def test_a_wrong_sweep(tmp_path, text, says):
    file = tmp_path / "wrong.py"
    file.write_text(f"from peftax.configs import default\nget_config = default.get_config\n{text}\n")
    with pytest.raises(ValueError, match=says):
        sweep.lay_out(str(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "adds, names",
    [
        (
            "add({'method.rank': np.int64(2), 'optimizer.learning_rate': np.float64(0.01)})",
            ["rank=2,learning_rate=0.01"],
        ),
        (
            "add({'method.targets': 'q_proj|v_proj'}), add({'method.targets': ['q_proj', 'v_proj']})",
            ["targets=q_proj_v_proj", "targets=q_proj_v_proj-"],
        ),
    ],
)
def test_values_of_all_kinds(tmp_path, adds, names):
    file = tmp_path / "kinds.py"
    head = "import numpy as np\nfrom peftax.configs import default\n\nget_config = default.get_config\n"
    file.write_text(f"{head}\n\ndef sweep(add):\n    {adds}\n")
    found = [f.name for f in sweep.lay_out(str(file), tmp_path / "w")]
    assert [name.startswith(start) for name, start in zip(found, names, strict=True)] == [True] * len(names)
    assert len(set(found)) == len(names) and sweep.lay_out(str(file), tmp_path / "w")


def test_a_wrong_engine_or_setting(here, tmp_path):
    with pytest.raises(ValueError, match="engine 'pbs' is none of local, slurm"):
        sweep.run(recipe_file(here, "engine"), tmp_path, on="pbs")
    with pytest.raises(ValueError, match="engine local has no setting 'job'; the nearest: 'jobs'"):
        sweep.run(recipe_file(here, "engine"), tmp_path, job=2)


def test_a_sweep_from_its_command(here, tmp_path, one_device, capsys, monkeypatch):
    """Six members; one fails by itself and is run again on request; what is finished is not."""
    file, workdir = recipe_file(here, "whole"), tmp_path / "w"
    folders = sweep.lay_out(file, workdir)
    broken = folders[2] / "member.json"
    said = json.loads(broken.read_text())
    broken.write_text(json.dumps({**said, "recipe": str(here / "gone.py")}))
    assert subprocess.run(sweep.command(folders[2]), capture_output=True).returncode == 1
    for folder in (folders[0], *folders[3:]):  # here, where programs are kept
        sweep.run_member(folder)
    assert [sweep.status(f) for f in folders] == ["finished", "waiting", "failed", *["finished"] * 3]
    assert "no recipe file" in sweep.error(folders[2])

    began = []
    monkeypatch.setattr("peftax.engines.local._start", lambda c, folder, cores: began.append(folder) or _Here(folder))
    assert cli.main(["sweep", f"--config={file}", f"--workdir={workdir}", "--together=1", "--extend=0"]) == 1
    told = capsys.readouterr().out
    assert began == [folders[1]] and "failed    name=lora,rank=2,learning_rate=0.1,seed=0: FileNotFoundError" in told
    broken.write_text(json.dumps(said))
    retry = ["--retry", "--set", "jobs=2", "--extend=0"]
    assert cli.main(["sweep", f"--config={file}", f"--workdir={workdir}", *retry]) == 0
    assert began == [folders[1], folders[2]]

    table = results.load(workdir)
    assert list(table.status) == ["finished"] * 6 and set(table["method.name"]) == {"lora", "ia3"}
    assert (table.step == 4).all() and (table.seconds > 0).all() and table.valid.notna().all()
    assert set(results.swept(table)) >= {"method.name", "optimizer.learning_rate"}
    chosen = results.choose(table)
    assert {c.arm["method.name"] for c in chosen} == {"lora", "ia3"}
    assert all(c.trials == 3 and c.valid == min(c.rates.values()) for c in chosen)
    assert cli.main(["ls", str(workdir)]) == 0
    assert capsys.readouterr().out.count("finished") >= 6
    assert cli.main(["diff", str(folders[0]), str(folders[1])]) == 0
    assert "config.optimizer.learning_rate: 0.001 | 0.01" in capsys.readouterr().out
    environment = json.loads((folders[0] / "environment.json").read_text())
    assert environment["packages"]["jax"] and environment["cores"] >= 1

    more = recipe_file(here, "whole", rates="(0.001, 0.01, 0.1, 0.3)")  # one more rate: two members more
    began.clear()
    assert cli.main(["sweep", f"--config={more}", f"--workdir={workdir}", "--dry"]) == 0
    sweep.lay_out(more, workdir)
    assert [sweep.status(f) for f in sweep.lay_out(more, workdir)].count("waiting") == 2


def test_members_that_may_train_in_one_program(here, tmp_path, one_device, monkeypatch):
    """LoRA's three rates are one population, (IA)³'s another; each member's folder holds what its own run's would."""
    file, workdir = recipe_file(here, "together"), tmp_path / "w"
    folders = sweep.lay_out(file, workdir)
    groups = sweep.populations(folders, 8)
    assert groups == [folders[:3], folders[3:]]
    assert sweep.populations(folders, 2) == [folders[:2], folders[2:3], folders[3:5], folders[5:]]
    assert sweep.populations(folders, 1) == [[f] for f in folders]
    looks, nll = [], evaluate.nll
    monkeypatch.setattr(evaluate, "nll", lambda *args, **how: looks.append(1) or nll(*args, **how))
    sweep.main(*map(str, folders[:3]))
    assert len(looks) == 1 + 2 * 3  # of one seed, they start alike
    assert [sweep.status(f) for f in folders] == ["finished"] * 3 + ["waiting"] * 3
    alone = sweep.lay_out(file, tmp_path / "alone")[1]
    sweep.run_member(alone)
    read = lambda f: [json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()]  # noqa: E731
    for mine, single in zip(read(folders[1]), read(alone), strict=True):
        assert mine.keys() == single.keys() and mine["step"] == single["step"]
        for key in mine.keys() - {"step"}:
            assert mine[key] == pytest.approx(single[key], rel=1e-4), (key, mine, single)
    one, other = (json.loads((f / "result.json").read_text()) for f in (folders[1], alone))
    assert one["trainable"] == other["trainable"] and one["population"] == 3
    assert one["valid"] == pytest.approx(other["valid"], rel=1e-4)
    a, b = ((f / "adapter" / "adapter_config.json").read_text() for f in (folders[1], alone))
    assert a == b
    assert sweep.populations(folders[3:] + [alone], 8)[-1] == [alone]  # it began by itself


@pytest.mark.parametrize("method, programs", [("lora", 1), ("hra", 2)])
def test_ranks_share_a_program_where_zeros_may_pad_them(here, tmp_path, method, programs):
    file = Path(recipe_file(here, f"ranks_of_{method}"))
    adds = f"""
    for rank in (2, 4):
        for rate in RATES:
            add({{"method.name": "{method}", "method.rank": rank, "optimizer.learning_rate": rate}})
"""
    file.write_text(file.read_text().partition("def sweep(add):")[0] + "def sweep(add):" + adds)
    folders = sweep.lay_out(str(file), tmp_path / "w")
    assert len(folders) == 6 and len(sweep.populations(folders, 8)) == programs


def test_a_population_goes_on_as_it_was(here, tmp_path):
    """With a member that failed in it; not where it has no checkpoint, and not where it has ended."""
    folders = sweep.lay_out(recipe_file(here, "on"), tmp_path / "w")
    first, names = folders[:3], [f.name for f in folders[:3]]
    for folder in first:
        (folder / "environment.json").write_text(json.dumps({"population": names}))
    (first[1] / "error.txt").write_text("FloatingPointError: step 2\n")
    stopped = [first[0], first[2], *folders[3:]]
    assert sweep.populations(stopped, 8) == [[first[0], first[2]], folders[3:]]
    (sweep._of_population(first) / "checkpoints" / "4").mkdir(parents=True)
    assert sweep.populations(stopped, 8) == [first, folders[3:]]
    assert sweep.populations(stopped, 1)[0] == first  # its checkpoint is of all
    for folder in (first[0], first[2]):
        (folder / "result.json").write_text("{}")
    assert sweep.populations([first[1]], 8) == [[first[1]]]  # tried again


class _Here:
    """A member that has run in this process."""

    def __init__(self, folder):
        self.code = 0
        try:
            sweep.run_member(folder)
        except Exception:
            self.code = 1

    def poll(self):
        return self.code


def test_a_killed_member_goes_on(here, tmp_path, one_device):
    """SIGKILL in the middle; nobody else may train it meanwhile, and started again it goes on to its end."""
    file = recipe_file(here, "killed", rates="(0.01,)", steps=40)
    folder = sweep.lay_out(file, tmp_path / "w")[0]
    process = subprocess.Popen(sweep.command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(folder.glob("checkpoints/[0-9]*")) and time.time() < deadline:
        time.sleep(0.05)
    assert sweep.status(folder) == "running"
    with pytest.raises(RuntimeError, match="another process trains this member"):
        sweep.run_member(folder)
    (folder / "error.txt").unlink(missing_ok=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sweep.status(folder) == "stopped"
    assert sweep.run_member(folder)["step"] == 40
    assert sweep.status(folder) == "finished"


def test_kubernetes_gets_a_manifest(here, tmp_path, monkeypatch):
    workdir = tmp_path / "my_sweep.2"
    with pytest.raises(ValueError, match="kubernetes wants image, claim: --set image=... --set claim=..."):
        sweep.run(recipe_file(here, "k8s"), workdir, on="kubernetes")
    assert not workdir.exists()
    how = {"on": "kubernetes", "together": 1, "image": "peftax:1", "claim": "runs", "parallel": 3}
    made = []
    for second in (5, 6):
        monkeypatch.setattr(time, "gmtime", lambda second=second: time.struct_time((2026, 1, 2, 3, 4, second, 4, 2, 0)))
        sweep.run(recipe_file(here, "k8s"), workdir, **how)
        manifest = json.loads((workdir / "jobset.yaml").read_text())
        job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
        made.append((manifest["metadata"]["name"], job["template"]["spec"]["containers"][0]["command"][-1]))
    assert (job["completions"], job["parallelism"]) == (6, 3)
    assert made == [
        (f"my-sweep-2-20260102-03040{s}", f"/runs/my_sweep.2/indices-20260102-03040{s}.json") for s in (5, 6)
    ]
    indices = workdir / Path(made[0][1]).name
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "4")
    ran = []
    monkeypatch.setattr(sweep, "run_member", ran.append)
    sweep.main(str(indices))
    assert ran == [workdir / json.loads(indices.read_text())[4][0]]


def test_engines_that_are_not_installed_say_what_to_install(here, tmp_path):
    for name, module in (("slurm", "submitit"), ("ray", "ray")):
        try:
            __import__(module)
        except ImportError:
            with pytest.raises(ValueError, match=rf"pip install peftax\[{name}\]"):
                sweep.run(recipe_file(here, name), tmp_path / name, on=name)


def test_the_local_engine_shares_cores(tmp_path):
    """Three members, two at a time: real processes, each on cores of its own and nice."""
    from peftax.engines import local

    script = "import os, pathlib, sys; told = f'{os.nice(0)} {os.sched_getaffinity(0)}'; "
    script += "pathlib.Path(sys.argv[1], 'seen').write_text(told)"
    commands = {}
    for i in range(3):
        (tmp_path / str(i)).mkdir()
        commands[tmp_path / str(i)] = [sys.executable, "-c", script, str(tmp_path / str(i))]
    local.submit(commands, tmp_path, jobs=2)
    seen = [(tmp_path / str(i) / "seen").read_text() for i in range(3)]
    assert all(int(s.split()[0]) >= local.NICE for s in seen)
    if len(os.sched_getaffinity(0)) > 1:
        assert len({s.split(" ", 1)[1] for s in seen}) == 2
