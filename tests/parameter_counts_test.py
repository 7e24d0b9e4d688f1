"""experiments/parameter_counts finds every integer again, and its committed report is what it finds."""

import csv
import dataclasses
import functools

import pytest

from experiments.parameter_counts import __main__ as experiment
from experiments.parameter_counts import backbones, cells

FOLDER = experiment.RUNS.parent
CELLS = cells.all_cells()


@functools.cache
def rows():
    return {(c.paper, c.cell): experiment.row(c) for c in CELLS}


@pytest.mark.parametrize("paper", dict.fromkeys(c.paper for c in CELLS))
def test_every_count_is_its_formulas_integer(paper):
    own = [r for r in rows().values() if r["paper"] == paper]
    assert {r["cell"]: r["computed"] for r in own} == {r["cell"]: r["worked_out"] for r in own}
    assert [r["cell"] for r in own if (r["status"] in ("nominal", "differs")) != bool(r["why"])] == []


def test_the_committed_report_is_what_is_found():
    held = list(csv.DictReader((FOLDER / "counts.csv").open()))
    assert held == [{k: str(v) for k, v in r.items()} for r in rows().values()] and len(held) == len(CELLS)
    told = experiment.summary(list(rows().values()), []).splitlines()[:2]
    assert [line for line in told if line not in (FOLDER / "report.md").read_text()] == []


def test_recorded_runs_are_counted_from_their_configs():
    held = {r["run"]: r["status"] for r in csv.DictReader((FOLDER / "peft_runs.csv").open())}
    states = {r["run"]: r["status"] for r in experiment.peft_runs()}
    assert "differs" not in states.values() and list(held) == list(states)
    assert [run for run in held if held[run] == "exact" != states[run]] == []


@pytest.mark.parametrize(
    ("computed", "published", "per", "how"),
    [
        (18_874_368, "18.8M", 0, "truncated"),
        (37_748_736, "37.7M", 0, "rounded"),
        (23_002_848, "23.00M", 0, "rounded"),
        (393_216, "0.35M", 0, "no"),
        (20_480, "20,480", 0, "equal"),
        (20_480, "20,481", 0, "no"),
        (56_098_816, ".83%", 6_738_415_616, "rounded"),
        (131_072_000, "<2%", 6_738_415_616, "below"),
        (131_072_000, "<1%", 6_738_415_616, "no"),
        (27_192_000_000_000_000, "2.7e16", 0, "rounded"),
        (7, "", 0, ""),
    ],
)
def test_agreement(computed, published, per, how):
    assert cells.agreement(computed, published, per) == how


def test_a_wrong_count_ends_the_run():
    good = {"paper": "A", "cell": "b", "computed": 3, "worked_out": 3}
    run = {"run": "lora", "computed": 5, "status": "differs"}
    experiment.check([good], [])
    with pytest.raises(SystemExit, match="2 counts are not .*A, b: 4; lora: 5"):
        experiment.check([good | {"computed": 4}], [run])


def test_outlines_have_the_llama_familys_names():
    """A shape-only model and a linen one of the same sizes count alike."""
    real = backbones.found("Llama-2-7B")
    stack = backbones.Stack(32, 4096, 11008, gated=True, biased=())
    shapes = backbones.Shapes((("embed_tokens", 32000, 4096),), (("layers", stack),), ("norm",), norm_bias=False)
    same = backbones.look(backbones.Outline(dataclasses.replace(shapes, head=32000)))
    assert same.total == real.total
    methods = ("lora", "dora", "vera", "ia3", "adapter", "prefix", "prompt", "ln_tuning", "compacter", "boft")
    assert {m: same.count(m) for m in methods} == {m: real.count(m) for m in methods}
