"""Choices and verdicts, on tables made by hand."""

import json
import math

import pandas as pd
import pytest

from peftax import results, sweep


def table(rows):
    return pd.DataFrame(
        [
            {"name": str(i), "status": status, "method.name": name, results.RATE: rate, "seed": seed, "valid": valid}
            for i, (name, rate, seed, valid, status) in enumerate(rows)
        ]
    )


LORA = {1e-4: 3.0, 1e-3: 2.0, 1e-2: 2.5}
ROWS = [
    *[("lora", rate, seed, valid + seed / 100, "finished") for rate, valid in LORA.items() for seed in (0, 1)],
    *[("ia3", rate, 0, valid, "finished") for rate, valid in ((1e-3, 3.0), (1e-2, 2.8))],
    ("ia3", 1e-1, 0, math.nan, "failed"),
]


def test_a_rate_is_chosen_by_its_mean_over_seeds():
    lora, ia3 = results.choose(table(ROWS))
    assert lora.arm == {"method.name": "lora"} and lora.rate == 1e-3 and lora.edge == "" and lora.trials == 6
    assert lora.valid == pytest.approx(2.005) and lora.seeds == [2.0, 2.01] and lora.members == ["2", "3"]
    assert ia3.rate == 1e-2 and ia3.edge == "" and ia3.rates[1e-1] == math.inf  # what failed is no optimum


@pytest.mark.parametrize("keep, edge", [((1e-3, 1e-2), "low"), ((1e-4, 1e-3), "high"), ((1e-3,), "only")])
def test_a_choice_at_the_edge_says_so(keep, edge):
    rows = [r for r in ROWS if r[0] == "lora" and r[1] in keep]
    assert results.choose(table(rows))[0].edge == edge


def test_an_open_sweep_is_not_chosen_from():
    with pytest.raises(ValueError, match="1 members are not finished, '0' first"):
        results.choose(table([("lora", 1e-3, 0, 2.0, "running")]))
    with pytest.raises(ValueError, match="no column 'test'"):
        results.choose(table(ROWS), metric="test")


def test_a_paired_comparison_worked_out_by_hand():
    """Differences -1, -2, -3: mean -2, standard error 1/sqrt(3); t of 2 degrees: 4.3027 (97.5%), 1.0607 (80%)."""
    found = results.verdict([5.0, 5.0, 5.0], [4.0, 3.0, 2.0])
    error = 1 / math.sqrt(3)
    assert found.difference == -2.0
    assert found.low == pytest.approx(-2 - 4.302653 * error) and found.high == pytest.approx(-2 + 4.302653 * error)
    assert found.detectable == pytest.approx((4.302653 + 1.060660) * error, rel=1e-5)
    assert found.said == "not resolved" and str(found) == "-2.0000 [-4.4841, +0.4841]"
    assert results.verdict([5.0, 5.0, 5.0], [4.0, 3.9, 4.1]).said == "supported"
    assert results.verdict([4.0, 3.9, 4.1], [5.0, 5.0, 5.0]).said == "contradicted"


def test_one_run_each_is_no_comparison():
    with pytest.raises(ValueError, match="1 and 1 runs"):
        results.verdict([1.0], [2.0])
    assert results.verdict([1.0, 1.1], [2.0, 2.1, 2.2], paired=False).said == "contradicted"


def test_an_arm_of_which_one_run_has_no_rate():
    """It is in the choice; the grid is of those that have one."""
    rates = (1e-3, 2.0), (1e-2, 1.0), (math.nan, 3.0)
    (chosen,) = results.choose(table([("lora", rate, 0, valid, "finished") for rate, valid in rates]))
    assert chosen.rate == 1e-2 and chosen.edge == "high" and len(chosen.rates) == 3
    (chosen,) = results.choose(table([("lora", rate, 0, 4 - valid, "finished") for rate, valid in rates]))
    assert math.isnan(chosen.rate) and chosen.edge == "only"


def test_seeds_stand_in_one_order_in_every_arm():
    rows = table([("lora", 1e-3, seed, float(seed), "finished") for seed in (3, 10, 0, 2)])
    assert results.choose(rows)[0].seeds == [0.0, 2.0, 3.0, 10.0] and results.choose(rows)[0].members[0] == "2"
    rows["seed"] = rows.seed.map({3: 3, 10: "data.seed=1", 0: 0, 2: 2})
    assert results.choose(rows)[0].seeds == [0.0, 2.0, 3.0, 10.0]


@pytest.mark.parametrize(
    "overrides, key, value",
    [
        ({"method.layers": "[0, 1]"}, "method.layers", "[0, 1]"),  # rows are grouped by it
        ({"method.rank": "4"}, "method.rank", 4),
        ({"data.seed": "7", **dict.fromkeys(sweep.SEEDS, "1")}, "seed", 1),
        ({"data.seed": "1"}, "seed", "data.seed=1"),  # no seed of all
    ],
)
def test_what_a_member_sweeps(tmp_path, overrides, key, value):
    (tmp_path / "a").mkdir()
    member = {"recipe": "r", "overrides": list(overrides.items())}
    (tmp_path / "a" / "member.json").write_text(json.dumps(member))
    row = results.load(tmp_path).iloc[0]
    assert row[key] == value and set(row.index) - {"name", "folder", "status"} == {key}


def test_arms_by_name():
    assert results.label({"method.name": "lora", "method.rank": 8, "optimizer.name": "lion"}) == (
        "lora, rank 8, optimizer.name lion"
    )
    assert results.label({"method.name": math.nan, "method.rank": 2.0}) == "rank 2"


def test_runs_that_do_not_differ():
    found = results.verdict([2.0, 2.0], [1.0, 1.0, 1.0], paired=False)
    assert found.said == "supported" and found.low == found.high == -1.0
