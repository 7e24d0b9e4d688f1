"""The project as others receive it: what a wheel holds, and that no file knows one machine."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Written with brackets, so that the patterns do not find themselves.
LOCAL = {
    "an absolute path of one machine": r"(?<![\w.~}\])/-])/(?:[w]ork|[r]oot|[h]ome|[U]sers)/[\w.]",
    "a folder beside the repository": r"\.\./[s]hared",
    "a package index's host": r"(?:[p]ypi|[p]ythonhosted|[n]pmjs)\.(?:org|io)\b|[d]eb\.debian\.org",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since a build in place leaves files, and without the network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("peftax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_every_package_is_listed():
    found = {".".join(f.parent.relative_to(ROOT).parts) for f in ROOT.glob("peftax/**/__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"peftax.configs", "peftax.configs.papers"}


def test_every_folder_of_the_package_is_a_package():
    folders = {f.parent for f in ROOT.glob("peftax/**/*.py")}
    assert [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()] == []


def test_wheel_holds_every_module_and_recipe(wheel):
    files = [f.relative_to(ROOT).as_posix() for f in ROOT.glob("peftax/**/*.py")]
    files += [f"peftax/{f.relative_to(ROOT).as_posix()}" for f in ROOT.glob("configs/**/*.py")]
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {"peftax/configs/default.py", "peftax/configs/papers/guanaco_7b.py"} <= set(files)
    assert sorted(set(files) - held) == []
    assert [name for name in held if name.startswith("tests/")] == []


def test_installed_recipe_can_be_imported(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import peftax.configs.default as d; d.get_config(); print(d.__file__)"
    # -S leaves out .pth files, and with them the editable install, whose finder would win.
    paths = [str(tmp_path), *(p for p in sys.path if p.endswith("site-packages"))]
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {paths!r}; {code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "peftax" / "configs" / "default.py")


def test_no_file_knows_this_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone: the tracked files are not known")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"git cannot list the tracked files: {done.stderr.strip()}")
    found = []
    for name in filter(None, done.stdout.split("\0")):
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" in data[:8192]:
            continue
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            found += [f"{name}:{number}: {what}" for what, p in LOCAL.items() if re.search(p, line)]
    assert found == []


@pytest.mark.parametrize(
    "line",
    ["/work" + "/main", 'x = "/root' + '/.pyenv"', "see ../" + "shared/design.md", "pypi" + ".org"],
)
def test_the_patterns_find_what_they_should(line):
    assert any(re.search(p, line) for p in LOCAL.values())


@pytest.mark.parametrize("line", ["frame/work/x.py", "arxiv.org/abs/2106.09685", "docs/home/page", "$HOME/.pyenv"])
def test_the_patterns_pass_what_is_fine(line):
    assert not any(re.search(p, line) for p in LOCAL.values())
