"""What a user with a TPU or GPU runs, on the CPU that is here."""

import json

from experiments.device import __main__ as device
from peftax.ops import kernels


def test_checks_times_and_reports(tmp_path, capsys):
    words = [f"--workdir={tmp_path}", "--rows=1,16", "--formats=nf4,int8", "--shapes=128x256", "--repeats=1"]
    device.main(words)
    said = json.loads((tmp_path / "results.json").read_text())
    assert len(said["products"]) == 8
    assert all(0 < p["kernels"]["xla"]["error"] < device.TOLERANCE for p in said["products"])
    assert said["memory"]["compiled"] > said["memory"]["base"]
    assert "| nf4 | 128x256 | 16 | dx |" in capsys.readouterr().out


def test_what_was_timed_is_what_dispatch_takes(tmp_path, monkeypatch):
    """A table of choices as --write leaves it."""
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "choice.json").write_text("{}")
    ways = {"xla": {"seconds": 2.0}, "triton": {"seconds": 1.0}, "mosaic_gpu": {"not": "too few rows"}}
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
        device.write({"device": "cpu", "platform": "cuda", "products": [{"kernels": ways}]})
    choice = json.loads((tmp_path / "tiles" / "choice.json").read_text())
    assert choice == {"cpu": {"kernel": "triton", "source": "timed"}}
    monkeypatch.setattr(kernels, "CHOICE", choice)
    assert kernels._default() == {"tpu": "tpu", "cuda": "triton"}
