"""A run as columns: phases, curves, constraints, and only as many points as a screen shows."""

from __future__ import annotations

from attrs import evolve

from spalf.core.recipe import Plan
from spalf.report import RunRecord, story
from spalf.report.numbers import short
from spalf.report.story import POINTS

from .conftest import line


def test_columns(plan: Plan, record: RunRecord) -> None:
    told = story(plan, record)
    assert told["steps"] == list(range(10, 101, 10))
    assert told["phases"] == [{"name": "fit", "from": 0, "to": 60}, {"name": "causal", "from": 60, "to": 100}]
    assert told["every"] == 1
    assert all(len(column) == 10 for column in told["curves"].values())
    assert told["curves"]["l0"][:2] == [10, 8]
    assert {"threshold.p50", "bandwidth.p95", "term.l0", "novel"} <= set(told["curves"])
    assert {"constraints", "step", "phase", "tokens"}.isdisjoint(told["curves"])
    assert told["calibration"] == [[1024, 1], [2048, 0.5]]


def test_a_constraint_is_blank_while_it_is_off(plan: Plan, record: RunRecord) -> None:
    told = story(plan, record)["constraints"]
    assert list(told) == list(plan.constraints)
    assert told["orthogonality"]["g"] == [None] * 6 + [0] * 4
    assert told["faithfulness"]["fast"][0] == 0.25
    assert told["faithfulness"]["lam"] == [1.5] * 10


def test_a_long_run_is_thinned_from_its_end(plan: Plan, record: RunRecord) -> None:
    lines = tuple(line(s, "fit") for s in range(1, 2 * POINTS + 2))
    told = story(plan, evolve(record, metrics=lines))
    assert told["every"] == 3
    assert len(told["steps"]) <= POINTS
    assert told["steps"][-1] == 2 * POINTS + 1


def test_a_run_without_a_step(plan: Plan, record: RunRecord) -> None:
    told = story(plan, evolve(record, metrics=()))
    assert told["steps"] == told["phases"] == told["calibration"] == []
    assert told["curves"] == {}


def test_missing_numbers_are_null(plan: Plan, record: RunRecord) -> None:
    lines = ({"step": 1, "phase": "fit", "l0": None}, {"step": 2, "phase": "fit", "l0": 2.0, "constraints": [1]})
    told = story(plan, evolve(record, metrics=lines))
    assert told["curves"] == {"l0": [None, 2]}
    assert told["constraints"]["drift"]["g"] == [None, None]


def test_short_numbers() -> None:
    assert short(0.123456789) == 0.12346
    assert repr(short(7.0)) == "7"
    assert short(1234567.0) == 1234600
    assert short(1234567, 9) == 1234567
    assert [short(x) for x in (None, True, float("nan"), float("inf"), "x")] == [None] * 5
    assert short(1e300) == 1e300
