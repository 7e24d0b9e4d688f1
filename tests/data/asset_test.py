import hashlib
import subprocess
from pathlib import Path

import pytest

from peftax.data import asset

WHEEL = "some_data-1.0-py3-none-any.whl"
SDIST = "someData-1.0.tar.gz"  # named as its author likes
SHA = hashlib.sha256(b"good").hexdigest()


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: `calls` are its commands, `serves` its file, `fails` its complaint."""

    class Pip:
        calls: list[list[str]] = []
        serves, fails, pinned = b"good", "", ""

    fake = Pip()
    fake.calls = []

    def run(command, **_):
        fake.calls.append(command)
        if not fake.fails:
            name = SDIST if "--no-binary=:all:" in command else WHEEL
            (Path(command[command.index("--dest") + 1]) / name).write_bytes(fake.serves)
            fake.pinned = "".join(f.read_text() for f in Path(command[command.index("--dest") + 1]).glob("*.txt"))
        return subprocess.CompletedProcess(command, int(bool(fake.fails)), "", fake.fails)

    monkeypatch.setattr(asset.subprocess, "run", run)
    return fake


def test_fetches_once_without_dependencies(pip, tmp_path):
    path = asset.fetch("some-data==1.0", SHA, into=tmp_path / "new")
    assert path == tmp_path / "new" / WHEEL and path.read_bytes() == b"good"
    assert "--no-deps" in pip.calls[0] and "--only-binary=:all:" in pip.calls[0]
    assert asset.fetch("some-data==1.0", SHA, into=tmp_path / "new") == path
    assert len(pip.calls) == 1 and [p.name for p in (tmp_path / "new").iterdir()] == [WHEEL]


def test_a_source_package_is_checked_by_pip_before_it_runs_any_of_it(pip, tmp_path):
    path = asset.fetch("someData==1.0", SHA, into=tmp_path, source=True)
    assert path.name == SDIST and "--require-hashes" in pip.calls[0]
    assert pip.pinned == f"someData==1.0 --hash=sha256:{SHA}\n"
    assert asset.fetch("someData==1.0", SHA, into=tmp_path, source=True) == path and len(pip.calls) == 1


def test_a_damaged_file_is_fetched_again(pip, tmp_path):
    (tmp_path / WHEEL).write_bytes(b"goo")
    assert asset.fetch("some-data==1.0", SHA, into=tmp_path).read_bytes() == b"good"


def test_default_folder_is_the_cache(pip, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTAX_CACHE", str(tmp_path / "cache"))
    assert asset.fetch("some-data==1.0", SHA).parent == tmp_path / "cache"
    monkeypatch.delenv("PEFTAX_CACHE")
    assert asset.cache_dir() == Path("~/.cache/peftax").expanduser()


def test_wrong_bytes_are_not_kept(pip, tmp_path):
    pip.serves = b"bad"
    with pytest.raises(ValueError, match="not the pinned file, not kept") as err:
        asset.fetch("some-data==1.0", SHA, into=tmp_path)
    assert "\n" not in str(err.value) and not list(tmp_path.iterdir())


def test_failure_is_one_line(pip, tmp_path):
    pip.fails = "WARNING: retrying\nERROR: No matching distribution found\nnotice"
    with pytest.raises(FileNotFoundError, match="some-data==1.0 .*No matching distribution") as err:
        asset.fetch("some-data==1.0", SHA, into=tmp_path)
    assert "\n" not in str(err.value) and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="not pinned"):
        asset.fetch("some-data", SHA, into=tmp_path)
