"""A damaged checkpoint is never loaded: whatever happens to its files, what is restored is what was saved."""

import gc
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from peftax.weights.checkpoint import Checkpoints

# of Orbax's readers, given up in the midst
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ARRAYS = {
    step: {"state": {"a": jnp.arange(600.0).reshape(20, 30) * step, "n": jnp.int32(step)}, "frozen": {}}
    for step in (2, 4, 6)
}
LIKE = jax.tree.map(jnp.zeros_like, ARRAYS[2])


@pytest.fixture(autouse=True)
def collected():
    """Those warnings come when the readers are collected: here, not in another file's test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    for step, arrays in ARRAYS.items():
        checkpoints.save(step, arrays, {"base": "abc", "data": {"next": step}})
    checkpoints.close()
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


@pytest.fixture
def warned(monkeypatch):
    """Our warnings; Orbax has some of its own."""
    told: list[str] = []

    def warning(text, *args):
        if "is damaged" in text:
            told.append(text % args)

    monkeypatch.setattr(logging, "warning", warning)
    return told


def restore(folder):
    checkpoints = Checkpoints(folder, keep=2)
    try:
        return checkpoints.restore(LIKE, base="abc")
    finally:
        checkpoints.close()


def remove(file):
    file.unlink()


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def change(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [remove, halve, empty, change])
def test_harm_to_any_file_is_skipped_or_harmless(written, tmp_path, warned, harm):
    files = sorted(f.relative_to(written) for f in (written / "6").rglob("*") if f.is_file())
    skipped = []
    for i, file in enumerate(files):
        folder = shutil.copytree(written, tmp_path / str(i) / "checkpoints")
        harm(folder / file)
        warned.clear()
        step, arrays, facts = restore(folder)
        assert facts["data"] == {"next": step}, file
        jax.tree.map(np.testing.assert_array_equal, arrays, ARRAYS[step])
        if step == 4:
            skipped.append(file)
            assert len(warned) == 1 and f"{folder / '6'} is damaged (" in warned[0] and "from step 4" in warned[0]
        else:
            assert step == 6 and not warned
    assert any("arrays" in file.parts for file in skipped) and any("facts" in file.parts for file in skipped)


def test_a_damaged_checkpoint_is_kept_aside_and_its_step_saved_again(folder, warned):
    shutil.rmtree(folder / "6" / "arrays" / "d")
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.restore(LIKE, base="abc")[0] == 4
    assert checkpoints.latest() == 4
    checkpoints.save(6, ARRAYS[6], {"base": "abc", "data": {"next": 6}})
    assert checkpoints.restore(LIKE, base="abc")[0] == 6
    checkpoints.close()
    assert (folder.parent / "checkpoints.damaged" / "6").is_dir()


def test_none_is_whole(folder):
    for step in ("4", "6"):
        shutil.rmtree(folder / step / "arrays")
    with pytest.raises(ValueError, match="no checkpoint is whole, of 2; of the newest, 6: .*Put back a copy") as error:
        restore(folder)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in folder.iterdir()) == ["4", "6"]  # nothing was moved


def test_what_a_kill_left_of_a_save_is_cleaned_up(folder):
    left = folder / "8.orbax-checkpoint-tmp"
    shutil.copytree(folder / "6", left)
    assert restore(folder)[0] == 6
    end = time.monotonic() + 60
    while left.exists():  # Orbax cleans up in a thread
        assert time.monotonic() < end
        time.sleep(0.01)


def test_another_base_is_refused_and_nothing_is_moved(folder):
    with pytest.raises(ValueError, match="checkpoint 6 was trained on another base"):
        Checkpoints(folder).restore(LIKE, base="abd")
    assert sorted(p.name for p in folder.iterdir()) == ["4", "6"]


def test_none_yet(tmp_path):
    assert restore(tmp_path / "new") is None
