"""The report of a sweep whose folders are made by hand: every figure, its data, and the pages."""

import csv
import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from peftax import cli, report, sweep
from peftax.report import figures

CONFIG = {"model": {"path": "base"}, "data": {"length": 64, "chat_template": None}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two ranks of LoRA and DoRA, three rates, two seeds; the largest rate of rank 16 fails."""
    into = tmp_path_factory.mktemp("reports") / "ranks"
    for method, better in (("lora", 0.0), ("dora", 0.05)):
        for rank in (4, 16):
            for rate in (1e-4, 1e-3, 1e-2):
                for seed in (0, 1):
                    name = f"name={method},rank={rank},rate={rate:g},seed={seed}"
                    overrides = [
                        ("method.name", method),
                        ("method.rank", str(rank)),
                        ("optimizer.learning_rate", str(rate)),
                    ]
                    overrides += [(key, str(seed)) for key in sweep.SEEDS]
                    run = into / name
                    run.mkdir(parents=True)
                    (run / "member.json").write_text(json.dumps({"recipe": "r", "overrides": overrides}))
                    if rank == 16 and rate == 1e-2:
                        (run / "error.txt").write_text(
                            "Traceback\nFloatingPointError: step 3: loss nan is not finite\n"
                        )
                        continue
                    end = 2 + (np.log10(rate) + 3) ** 2 / 4 - better - rank / 1000 + seed / 100
                    lines = [{"step": s, "valid_nll": end + 1 / (s + 1)} for s in (0, 10, 20)]
                    lines.append({"step": 20, "loss": end})
                    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
                    result = {"step": 20, "valid": end, "best": [20, end], "seconds": 9.5, "peak_bytes": 2**30}
                    (run / "result.json").write_text(json.dumps({**result, "trainable": rank * 1000}))
                    (run / "config.json").write_text(json.dumps(CONFIG))
                    (run / "metrics.json").write_text(json.dumps({"general": 3 + rate}))
                    if rate == 1e-3 or (rate == 1e-4 and method == "dora" and rank == 4):  # once chosen, no longer
                        (run / "test.json").write_text(json.dumps({"nll": end + 0.1}))
                    base = sweep.base_file(run)
    base.parent.mkdir()
    base.write_text(json.dumps({"general": 2.5}))
    return into


def test_the_report(folder, capsys):
    assert cli.main(["report", str(folder), "--title", "Ranks & methods"]) == 0
    page = folder / "report" / "index.html"
    assert capsys.readouterr().out.strip() == str(page)
    into = page.parent
    for name, *_ in report.FIGURES:
        assert (into / f"{name}.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (
            into / f"{name}.svg"
        ).read_text()
        assert list(csv.DictReader((into / f"{name}.csv").open())), name
    chosen = list(csv.DictReader((into / "chosen.csv").open()))
    assert [(r["name"], r["rank"], r["learning rate"], r["in its grid"]) for r in chosen] == [
        *[("dora", "16", "0.001", "inside"), ("dora", "4", "0.001", "inside")],
        *[("lora", "16", "0.001", "inside"), ("lora", "4", "0.001", "inside")],
    ]
    assert float(chosen[0]["valid"]) == pytest.approx(2 - 0.05 - 0.016 + 0.005) and chosen[0]["trials"] == "6"
    assert float(chosen[0]["test"]) == pytest.approx(float(chosen[0]["valid"]) + 0.1)
    assert [r["rates read"] for r in chosen] == ["1", "2", "1", "1"]
    forgot = list(csv.DictReader((into / "forgetting.csv").open()))
    assert {(r["data"], r["score"]) for r in forgot} == {("general", "test")}
    assert all(float(r["change"]) == pytest.approx(3.001 - 2.5) for r in forgot)
    assert len(list(csv.DictReader((into / "members.csv").open()))) == 24
    text = (into / "report.md").read_text()
    assert "20 finished, 4 failed of 24." in text and "FloatingPointError: step 3" in text
    assert "![Rank and learning rate](rank_and_rate.png) ([data](rank_and_rate.csv))" in text
    tex = (into / "table.tex").read_text()
    assert tex.count(r"\\") == 5 and r"$\pm$" in tex and r"\toprule" in tex


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]


def test_the_page_needs_nothing_else(folder):
    page = report.write(folder, title="Ranks & methods")
    read = _Page()
    read.feed(page.read_text())
    assert read.tags.count("img") == len(report.FIGURES) and read.tags.count("table") == 1
    assert all(source.startswith("data:image/png;base64,") for source in read.sources)
    assert "<h1>Ranks &amp; methods</h1>" in page.read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here: apt-get install chromium")
def test_a_browser_shows_it(folder, tmp_path):
    page, picture = report.write(folder), tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,3000", f"--screenshot={picture}"]
    subprocess.run(["chromium", *flags, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)
    assert picture.stat().st_size > 30_000
    dump = ["chromium", *flags[:3], "--dump-dom", page.resolve().as_uri()]
    shown = subprocess.run(dump, check=True, capture_output=True, text=True, timeout=120).stdout
    assert shown.count("<img") == len(report.FIGURES)


def test_one_rate_and_one_method_have_fewer_figures(folder, tmp_path):
    one = tmp_path / "one"
    for run in folder.glob("name=lora,rank=4,rate=0.001,*"):
        shutil.copytree(run, one / run.name)
    shutil.copytree(folder / "bases", one / "bases")
    report.write(one)
    assert {f.stem for f in (one / "report").glob("*.png")} == {"curves", "forgetting", "costs"}
    assert "only one" in (one / "report" / "report.md").read_text()


@pytest.mark.parametrize("losses, scale", [((0.3, 0.4, 1.2), "linear"), ((0.3, 0.4, 7.0), "log")])
def test_far_losses_leave_room_for_near_ones(losses, scale):
    rates = pd.DataFrame({"arm": "lora", "learning rate": (1e-4, 1e-3, 1e-2), "valid": losses})
    figure = figures.draw_rates(rates)
    assert figure.axes[0].get_yscale() == scale
    figures.close(figure)


def test_cells_of_all_letters(tmp_path):
    """A bar parts no columns, LaTeX's own letters are letters, keys that end alike are columns of their own."""
    for i, (targets, optimizer) in enumerate((("q|v", "adamw"), (r".*\.{2}^$~", "lion"))):
        run = tmp_path / str(i)
        run.mkdir()
        own = {"method.name": "lora", "optimizer.name": optimizer, "method.targets": targets, "data.valid": "a"}
        (run / "member.json").write_text(json.dumps({"recipe": "r", "overrides": list(own.items())}))
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "valid_nll": 1.0}) + "\n")
        (run / "result.json").write_text(json.dumps({"step": 1, "best": [1, 1.0 + i], "seconds": 1.0, "peak_bytes": 1}))
        (run / "config.json").write_text(json.dumps(CONFIG))
        (run / "metrics.json").write_text(json.dumps({"valid": 8.0}))
    page = report.write(tmp_path)
    chosen = list(csv.DictReader((page.parent / "chosen.csv").open()))
    assert [(r["method.name"], r["optimizer.name"], r["targets"]) for r in chosen] == [
        ("lora", "adamw", "q|v"),
        ("lora", "lion", r".*\.{2}^$~"),
    ]
    assert [(r["valid"], r["metrics.valid"], r["data.valid"]) for r in chosen] == [
        *[("1.0", "8.0", "a"), ("2.0", "8.0", "a")]
    ]
    assert r"| q\|v |" in (page.parent / "report.md").read_text() and "<td>q|v</td>" in page.read_text()
    words = r".*\textbackslash{}.\{2\}\textasciicircum{}\$\textasciitilde{}"
    assert f"& {words} &" in (page.parent / "table.tex").read_text()


def test_failed_runs_and_no_valid(folder, tmp_path):
    """A failed run's cell is empty in the map; where nothing was scored on valid, nothing was chosen."""
    report.write(folder)
    cells = list(csv.DictReader((folder / "report" / "rank_and_rate.csv").open()))
    assert len(cells) == 10 and not [c for c in cells if (c["rank"], c["learning rate"]) == ("16", "0.01")]
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    for run in bare.glob("name=*"):
        (run / "metrics.jsonl").write_text(json.dumps({"step": 20, "loss": 1.0}) + "\n")
        if (run / "result.json").exists():
            (run / "result.json").write_text(json.dumps({"step": 20, "best": [20, None], "seconds": 1.0}))
    text = report.write(bare).with_name("report.md").read_text()
    assert "20 finished, 4 failed of 24." in text and "chosen" not in text


def test_nothing_to_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither a run nor a sweep"):
        report.write(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "member.json").write_text(json.dumps({"recipe": "r", "overrides": []}))
    with pytest.raises(ValueError, match="no member is finished"):
        report.write(tmp_path)
