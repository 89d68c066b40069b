"""Measuring on documents that training never saw: against numpy, and without leaving a trace.

Shapes as in spalf/core/values.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from attrs import evolve

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.engine import evaluate
from spalf.engine.bootstrap import Tally
from spalf.engine.step import dead_window, reconstructor
from spalf.testing import toy_plan
from spalf.testing.whole import moved, snapshot, stage_for, started


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "ROWS", 1024)


@pytest.fixture
def mid() -> tuple[Plan, TrainingState]:
    """A state in the middle of `fit`, on data with a mean of 8 times its spread."""
    plan = toy_plan(source__bias="100.0")
    return plan, started(plan)


def held_out_rows(state: TrainingState, n: int = 1024) -> torch.Tensor:
    stream = state.stream.held_out()
    return torch.cat([stream.next(128).x_BD for _ in range(n // 128)])


def explained(x: torch.Tensor, error: torch.Tensor) -> float:
    """R2 as a tally has it, added 64 rows at a time."""
    tally = Tally()
    for unit, (part, e) in enumerate(zip(x.split(64), error.split(64), strict=True)):
        tally.add(torch.full((len(part),), unit), n=torch.ones(len(part)), **evaluate.squares("raw", part, e))
    return tally.samples(lambda totals: {"r2": evaluate.r2("raw", totals)}).values()["r2"]


# ---------------------------------------------------------------------------------------------------------- dictionary
def test_explained_variance_against_numpy(mid: tuple[Plan, TrainingState]) -> None:
    """FVU = E|x - x_hat|^2 / (E|x|^2 - |E x|^2), both sums over the whole set."""
    plan, state = mid
    out = evaluate.dictionary(plan, state)
    x_BD = held_out_rows(state)
    x, hat = x_BD.double().numpy(), reconstructor(state)(x_BD).detach().double().numpy()
    assert np.linalg.norm(x.mean(0)) > 5 * x.std(0).max()
    assert out["r2_raw"] == pytest.approx(1 - ((x - hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), abs=1e-5)
    y = state.metric.white(x_BD).double().numpy()
    white_hat = state.metric.white(reconstructor(state)(x_BD).detach()).double().numpy()
    assert out["r2_whitened"] == pytest.approx(
        1 - ((y - white_hat) ** 2).sum() / ((y - y.mean(0)) ** 2).sum(), abs=1e-4
    )
    z_BF = state.sae.encode(state.metric.white(x_BD)).dense().detach().numpy()
    assert out["l0"] == pytest.approx((z_BF > 0).sum(1).mean())
    assert out["rows"] == 1024.0


def test_a_mean_that_dwarfs_the_spread_costs_no_digits() -> None:
    """Float64 sums: at a mean of 10^4 spreads, float32 ones would have no digit left."""
    x = torch.randn(4096, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e4
    error = 0.1 * torch.randn(4096, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = 1 - error.square().sum() / (x - x.mean(0)).square().sum()
    assert explained(x, error) == pytest.approx(float(wanted), rel=1e-6)


def test_perfect_and_mean_reconstructions(mid: tuple[Plan, TrainingState]) -> None:
    x = held_out_rows(mid[1]).double()
    assert explained(x, torch.zeros_like(x)) == 1.0
    assert explained(x, x - x.mean(0)) == pytest.approx(0.0, abs=1e-9)


def test_intervals_of_the_dictionary_s_own_numbers(mid: tuple[Plan, TrainingState]) -> None:
    plan, state = mid
    out = evaluate.dictionary(plan, state)
    for name in ("l0", "r2_raw", "r2_whitened", "shrinkage"):
        assert out[f"{name}.ci_low"] < out[name] < out[f"{name}.ci_high"], name
    assert out["l0.p10"] <= out["l0.median"] <= out["l0.p90"]
    assert out["dense_fraction"] <= 1 - out["dead_fraction"]
    assert "documents" not in out, "rows of a synthetic source are independent"


def test_text_is_resampled_by_document() -> None:
    plan, state = stage_for(frozenset({"logits"}))
    with evaluate.untouched(state):
        tally = Tally()
        units, rows = zip(*evaluate.held_out_rows(plan, state, tally), strict=True)
    sequences = state.stream.held_out().sequences(1024 // 31)
    assert torch.equal(torch.cat(units), sequences.document_ST[:, 1:].flatten())
    assert torch.equal(torch.cat(rows), state.stream.activations(sequences)[:, 1:].flatten(0, 1))
    out = evaluate.dictionary(plan, state)
    assert out["rows"] == sequences.tokens_ST[:, 1:].numel()
    assert out["documents"] == len(set(torch.cat(units).tolist())) > 3


def test_dead_is_silent_for_long_and_here_too(mid: tuple[Plan, TrainingState]) -> None:
    plan, state = mid
    bias_F = state.sae.b_enc_F.detach().clone()
    bias_F[:6] = -1e4  # never fires again
    state.learner.assign("b_enc_F", bias_F)
    state.silent_F.zero_()
    assert evaluate.dictionary(plan, state)["dead_fraction"] == 0.0, "not silent for long enough yet"
    state.silent_F[:9] = dead_window(plan) + 1  # 6, 7 and 8 are said to be silent, and fire here
    out = evaluate.dictionary(plan, state)
    assert out["dead_fraction"] == out["dead_fraction.free"] == 6 / 64
    state.silent_F[:3] = dead_window(plan)
    assert evaluate.dictionary(plan, state)["dead_fraction"] == 3 / 64
    assert out["dead_window"] == 2560.0


def test_strata_share_the_l0(mid: tuple[Plan, TrainingState]) -> None:
    plan, state = mid
    state.sae._rows = {"low": slice(0, 10), "high": slice(10, 64)}  # type: ignore[attr-defined]
    out = evaluate.dictionary(plan, state)
    fired_F = state.sae.encode(state.metric.white(held_out_rows(state))).fired_F().double()
    assert out["share_of_l0.low"] == pytest.approx(float(fired_F[:10].sum() / fired_F.sum()))
    assert out["share_of_l0.low"] + out["share_of_l0.high"] == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------------------ no trace
class Nosy:
    """An evaluator that takes rows, draws, and says what it was given."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.seen = fails, []  # type: ignore[var-annotated]

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        self.seen.append(state.stream.next(64).x_BD)
        torch.rand(3, generator=state.rng.device)
        assert not torch.is_grad_enabled()
        if self.fails:
            raise ValueError("an evaluator that fails")
        return {"sum": float(self.seen[-1].sum())}


def with_evaluators(plan: Plan, **evaluators: Any) -> Plan:
    return evolve(plan, recipe=evolve(plan.recipe, evaluator=evaluators))


def test_nothing_of_the_state_changes(mid: tuple[Plan, TrainingState]) -> None:
    plan, state = mid
    before, stream = snapshot(state), state.stream
    plan = with_evaluators(plan, b=Nosy(), a=Nosy())
    first, second = evaluate.evaluate(plan, state), evaluate.evaluate(plan, state)
    assert list(first) == ["dictionary", "a", "b"]
    assert first == second
    assert first["a"] == first["b"], "each evaluator starts at the same rows"
    evaluate.constraints(plan, state, batches=2)
    assert state.stream is stream
    assert moved(before, snapshot(state)) == []


def test_an_evaluator_that_fails_leaves_no_trace_either(mid: tuple[Plan, TrainingState]) -> None:
    plan, state = mid
    before, stream = snapshot(state), state.stream
    with pytest.raises(ValueError, match="an evaluator that fails"):
        evaluate.evaluate(with_evaluators(plan, a=Nosy(fails=True)), state)
    assert state.stream is stream
    assert moved(before, snapshot(state)) == []
    assert torch.is_grad_enabled()


def test_held_out_rows_alone(mid: tuple[Plan, TrainingState], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, state = mid
    nosy = Nosy()
    with monkeypatch.context() as patch:
        patch.setattr(state.stream, "next", lambda n: pytest.fail("rows of training were measured"))
        evaluate.evaluate(with_evaluators(plan, a=nosy), state)
        evaluate.constraints(plan, state, batches=1)
    assert torch.equal(nosy.seen[0], held_out_rows(state)[:64])
    training = plan.recipe.source.open(plan.recipe.seed, state.device).next(20_000).x_BD
    # rows in which no feature fires are all the same
    fires_B = state.stream.held_out().next(64).truth_BN.any(1)
    assert not bool((training[:, None] == nosy.seen[0][fires_B][None]).all(-1).any())


def test_only(mid: tuple[Plan, TrainingState]) -> None:
    plan, state = mid
    plan = with_evaluators(plan, a=Nosy(), b=Nosy())
    assert list(evaluate.evaluate(plan, state, only=["b"])) == ["b"]
    assert list(evaluate.evaluate(plan, state, only=["a", "dictionary"])) == ["dictionary", "a"]


# --------------------------------------------------------------------------------------------------------- constraints
def batches_of(state: TrainingState, n: int) -> Iterator[torch.Tensor]:
    stream = state.stream.held_out()
    for _ in range(n):
        yield stream.next(128).x_BD


def test_a_constraint_s_violation_is_a_mean_over_held_out_batches(mid: tuple[Plan, TrainingState]) -> None:
    plan, state = mid
    out = evaluate.constraints(plan, state, batches=4)
    assert set(out) == {"faithfulness", "orthogonality"}
    budget = float(state.control.budget_M[0])
    values = []
    for x_BD in batches_of(state, 4):
        error = (x_BD - reconstructor(state)(x_BD).detach()).double().numpy()
        values.append((error**2).sum(1).mean())
    own = out["faithfulness"]
    assert own["violation"] == pytest.approx(np.mean(values) / budget - 1, abs=1e-4)
    assert own["budget"] == budget
    assert own["multiplier"] == float(state.control.lam_M[0])
    assert own["penalty"] == float(state.control.rho_M[0])
    filtered = plan.recipe.filter.signal(state.control.filter, torch.zeros(2), state.control.on_M).fast_M
    assert own["filtered"] == float(filtered[0])


@pytest.mark.parametrize(
    ("filtered", "violation", "feasible"),
    [(-0.01, -0.01, True), (0.0, 0.04, True), (-0.01, 0.06, False), (0.01, 0.01, False), (0.01, -0.5, True)],
)
def test_feasible_by_both_measures(
    mid: tuple[Plan, TrainingState], filtered: float, violation: float, feasible: bool
) -> None:
    plan, state = mid
    value = evaluate.constraints(plan, state, batches=1)["faithfulness"]
    unit = value["budget"] * (1 + value["violation"])
    fast_M = torch.tensor([filtered, -1.0])
    state.control = evolve(
        state.control,
        budget_M=torch.tensor([unit / (1 + violation), 1e9]),
        filter=evolve(state.control.filter, fast_M=fast_M),
    )
    assert evaluate.constraints(plan, state, batches=1)["faithfulness"]["feasible"] is feasible


def test_what_is_off_is_not_reported(mid: tuple[Plan, TrainingState]) -> None:
    plan, state = mid
    state.control = evolve(state.control, on_M=torch.tensor([False, True]))
    assert set(evaluate.constraints(plan, state, batches=1)) == {"orthogonality"}
