"""Derived numbers with what the run has settled, measures with their intervals, the frontier as points."""

from __future__ import annotations

from attrs import evolve

from spalf.core.recipe import Derived, Plan
from spalf.report import RunRecord, evaluation, headline, parameters


def test_calibrated_numbers_take_the_run_s_values(plan: Plan) -> None:
    derived = (
        Derived(path="F", value=64, formula="given", origin="knobs.F"),
        Derived(path="constraint.causal.budget", value=None, formula="0.95 * KL", origin="on entering phase.causal"),
        Derived(path="phase.calibrate.tokens", value=None, formula="until", origin="phase.calibrate"),
    )
    rows = parameters(evolve(plan, derived=derived), {"causal.budget": 0.5512775})
    assert rows[0] == {"path": "F", "value": 64, "formula": "given", "origin": "knobs.F"}
    assert rows[1]["value"] == 0.5512775
    assert rows[1]["calibrated"]
    assert rows[2]["value"] is None


def test_every_number_of_a_plan_has_a_row(plan: Plan) -> None:
    assert [row["path"] for row in parameters(plan, {})] == [d.path for d in plan.derived]


def test_measures_and_intervals(record: RunRecord) -> None:
    told = {one["name"]: one for one in evaluation(record)}
    assert told["dictionary"] == {
        "name": "dictionary",
        "rows": [{"name": "l0", "value": 6.5}, {"name": "r2_raw", "value": 0.81}, {"name": "rows", "value": 65536}],
    }
    assert told["downstream_loss"]["documents"] == 17
    assert told["downstream_loss"]["rows"] == [{"name": "kl", "value": 0.25, "low": 0.2, "high": 0.3125}]


def test_what_was_measured_later_counts(record: RunRecord) -> None:
    told = {one["name"]: one for one in evaluation(record, {"dictionary": {"l0": 7.0}, "geometry": {"coherence": 0.5}})}
    assert told["dictionary"]["rows"] == [{"name": "l0", "value": 7}]
    assert told["geometry"]["rows"] == [{"name": "coherence", "value": 0.5}]
    assert "downstream_loss" in told


def test_a_frontier_is_points(record: RunRecord) -> None:
    [one] = [one for one in evaluation(record) if "points" in one]
    assert one["rows"] == []
    assert [p["scale"] for p in one["points"]] == [0.5, 1, 2]
    assert one["points"][1]["ce"] == {"name": "ce@1", "value": 2.75, "low": 2.7, "high": 2.8}
    assert one["points"][0]["l0"]["value"] == 12


def test_a_measure_that_is_called_low_is_a_measure(record: RunRecord) -> None:
    told = evaluation(evolve(record, summary={"evaluators": {"x": {"share.ci_low": 0.25, "l0@best": 3.0, "y": None}}}))
    assert [row["name"] for row in told[0]["rows"]] == ["share.ci_low", "l0@best", "y"]
    assert told[0]["rows"][2]["value"] is None


def test_nothing_was_measured(plan: Plan, record: RunRecord) -> None:
    bare = evolve(record, summary={})
    assert evaluation(bare) == []
    assert headline(plan, bare)["summary"] == {}


def test_headline(plan: Plan, record: RunRecord) -> None:
    told = headline(plan, record)
    assert told["F"] == plan.knobs.F
    assert told["hook"] == plan.facts.hook
    assert told["versions"] == {"torch": "2.13.0"}
    assert told["summary"]["l0"] == 6.5
    assert "evaluators" not in told["summary"]
