"""The story without the notes around it, in rows."""

import zipfile

import pytest

from peftax.data import asset, prose

STORY = ["First line\r\nand its second.", "Another paragraph.", "x" * prose.LONG, "The end."]


def wheel(folder, text):
    file = folder / "a.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(prose.FILE, text.encode("utf-8-sig"))
    return file


def test_rows_hold_the_story_alone(tmp_path, monkeypatch):
    text = f"Gutenberg\n\nBy Verne\n{prose.BEGINS}\n" + "\r\n\r\n".join(STORY) + f"\n\n{prose.ENDS} EBOOK\nlicense"
    file = wheel(tmp_path, text)
    assert prose.load(file) == ["First line and its second.", "Another paragraph.", "x" * prose.LONG, "The end."]
    monkeypatch.setattr(asset, "fetch", lambda *pinned: file)
    first, last = prose.examples("test")
    assert first["completion"].startswith("First line and its second.\n\nAnother") and last["completion"] == "The end."
    assert {first["prompt"], last["prompt"]} == {""}
    with pytest.raises(ValueError, match="no split 'train', only test"):
        prose.examples("train")


def test_another_text_is_not_taken_for_it(tmp_path):
    with pytest.raises(ValueError, match="is not the text that was pinned"):
        prose.load(wheel(tmp_path, "Something else.\n"))
