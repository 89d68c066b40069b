"""The end of a run: the contract's keys, and plain sentences on every target that was not met."""

from __future__ import annotations

import json
from typing import Any

import pytest

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.engine import evaluate
from spalf.engine.frontier import r2_at_l0
from spalf.engine.summary import notes, summarize
from spalf.record import plain
from spalf.testing import toy_plan
from spalf.testing.whole import CPU, advance, build, enter, stage_for, started, through

CONTRACT = {
    "l0",
    "l0_target",
    "r2_raw",
    "r2_whitened",
    "ce_clean",
    "ce_patched",
    "ce_mean_ablated",
    "loss_recovered",
    "kl",
    "dead_fraction",
    "constraints",
    "wall_seconds",
}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "ROWS", 1024)


def test_the_contract_s_keys() -> None:
    plan = toy_plan()
    out = summarize(plan, started(plan), "done", {"fit": 1.23456})
    assert out.keys() >= CONTRACT
    assert out["ce_clean"] is out["kl"] is out["loss_recovered"] is None, "this source has no logits"
    assert (out["outcome"], out["step"], out["seed"], out["backend"]) == ("done", 12, 1, "torch")
    assert out["wall_seconds"] == {"fit": 1.235}
    assert set(out["constraints"]) == {"faithfulness", "orthogonality"}
    assert {"violation", "multiplier", "feasible"} <= out["constraints"]["faithfulness"].keys()
    assert out["feasible"] is all(c["feasible"] for c in out["constraints"].values())
    assert out["l0"] == out["evaluators"]["dictionary"]["l0"]
    json.dumps(plain(out), allow_nan=False)


def test_the_language_model_s_losses_whatever_their_evaluator_is_called() -> None:
    from attrs import evolve

    from spalf.parts.evaluator import DownstreamLoss

    plan, state = stage_for(frozenset({"logits"}))
    evaluators = {"of_the_model": DownstreamLoss(sequences=2)}
    plan = evolve(plan, recipe=evolve(plan.recipe, evaluator=evaluators))
    out = summarize(plan, state, "done", {})
    for key in ("ce_clean", "ce_patched", "ce_mean_ablated", "kl"):
        assert out[key] == out["evaluators"]["of_the_model"][key] > 0
    assert out["loss_recovered"] == out["evaluators"]["of_the_model"].get("loss_recovered")


# ---------------------------------------------------------------------------------------------------------------- notes
def held(**changes: Any) -> dict[str, dict[str, Any]]:
    base = {"violation": -0.1, "filtered": -0.1, "multiplier": 2.5, "penalty": 1.0, "budget": 4.0, "feasible": True}
    return {"faithfulness": {**base, **changes}}


@pytest.fixture(scope="module")
def small() -> tuple[Plan, TrainingState]:
    plan = toy_plan()
    return plan, started(plan)


def test_a_target_that_is_met_needs_no_words(small: tuple[Plan, TrainingState]) -> None:
    assert notes(*small, {"l0": 6.5}, held()) == []


def test_a_violation_on_held_out_documents(small: tuple[Plan, TrainingState]) -> None:
    """In the unit of its knob: at a target of 0.8, a quarter above the budget is 1 - 0.2 * 1.25."""
    told = notes(*small, {"l0": 6.0}, held(violation=0.25, filtered=-0.01, feasible=False))
    assert told == [
        "constraint faithfulness is not met on held-out documents: its value exceeds the budget by 25.0% "
        "(multiplier 2.5); attainable with this recipe: R2 0.750 against 0.8"
    ]


def test_a_violation_on_the_training_stream(small: tuple[Plan, TrainingState]) -> None:
    (told,) = notes(*small, {"l0": 6.0}, held(violation=0.03, filtered=0.02, feasible=False))
    assert "is not met on the training stream: its value exceeds the budget by 2.0%" in told
    assert told.endswith("attainable with this recipe: R2 0.796 against 0.8")


def test_a_constraint_without_a_knob_is_told_in_its_own_unit(small: tuple[Plan, TrainingState]) -> None:
    violated = held(violation=0.25, feasible=False)["faithfulness"]
    (told,) = notes(*small, {"l0": 6.0}, {"orthogonality": violated})
    assert told.startswith("constraint orthogonality is not met on held-out documents")
    assert told.endswith("attainable with this recipe: 5 against a budget of 4")


def test_a_multiplier_at_its_limit_is_told(small: tuple[Plan, TrainingState]) -> None:
    limit = small[0].recipe.dual.limit  # type: ignore[attr-defined]
    (told,) = notes(*small, {"l0": 6.0}, held(violation=0.25, multiplier=limit, feasible=False))
    assert f"(multiplier {limit:.3g}, at its limit)" in told


def test_an_l0_above_its_target(small: tuple[Plan, TrainingState]) -> None:
    plan, state = small
    (told,) = notes(plan, state, {"l0": 24.0}, held())
    x_BD = state.stream.held_out().next(512).x_BD
    attainable = r2_at_l0(state, x_BD, 6.0, "raw")
    assert told == (
        f"L0 24.0 is above L0_target 6: R2_target 0.8 costs more features than that. At L0 6 this dictionary has "
        f"R2 {attainable:.3f} (raw); lower knobs.R2_target towards it, raise knobs.L0_target, or train longer"
    )
    assert notes(plan, state, {"l0": 6.6}, held()) == [], "a tenth above is near enough"


def test_an_infeasible_target_ends_with_a_report() -> None:
    """R2 of 0.999 in 100 steps: no NaN, the multiplier within its limit, and the summary says what was reached."""
    plan = toy_plan(knobs__R2_target="0.999")
    state = build(plan, CPU)
    through(plan, state, "calibrate")
    enter(plan, state, "fit")
    advance(plan, state, 1000)
    out = summarize(plan, state, "done", {})
    own = out["constraints"]["faithfulness"]
    assert not out["feasible"]
    assert not own["feasible"]
    assert own["violation"] > 1
    assert own["multiplier"] <= plan.recipe.dual.limit  # type: ignore[attr-defined]
    first = next(n for n in out["notes"] if "faithfulness" in n)
    assert f"exceeds the budget by {own['violation']:.1%}" in first
    # the attainable R2 is the one that the summary measures, up to the sample
    attained = float(first.split("attainable with this recipe: R2 ")[1].split(" against 0.999")[0])
    assert attained == pytest.approx(1 - 0.001 * (1 + own["violation"]), abs=1e-3)
    assert attained == pytest.approx(out["r2_raw"], abs=0.02)
    assert any("lower knobs.R2_target towards it" in n for n in out["notes"])
