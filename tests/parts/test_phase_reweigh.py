"""`reweigh`: the errors' covariance, and what is measured by its inverse. Shapes as in spalf/parts/phase/reweigh.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.values import Raw, White
from spalf.engine import checkpoint
from spalf.engine.build import build
from spalf.engine.step import look, view_of
from spalf.errors import RecipeError
from spalf.parts.phase import Reweigh
from spalf.parts.term import RelativeMse
from spalf.testing import toy_plan
from spalf.testing.whole import CPU, advance, enter, through

PHASES = '["calibrate", "fit", "reweigh", "rest"]'
GATE = '{ use = "feasible", earliest = 0.5, latest = 0.5 }'
HALF = f'{{ use = "constrained", terms = ["l0"], constraints = ["faithfulness"], gate = {GATE} }}'
REST = '{ use = "constrained", terms = ["residual"], constraints = ["l0_rate"], gate = "exhausted" }'


def plan_of(**sets: str) -> Plan:
    around = {
        "activation__refine": "true",
        "phases": PHASES,
        "phase__fit": HALF,
        "phase__reweigh": "{ samples = 4096 }",
        "phase__rest": REST,
        "constraint__l0_rate": "{}",
        "term__residual": '{ use = "relative_mse", space = "residual" }',
        "whitener__condition": "1e6",
    }
    return toy_plan(**{**around, **sets})


def reweighed(plan: Plan) -> tuple[TrainingState, Tensor, Tensor, Tensor]:
    """A state at the end of the phase; its errors and whitened rows, collected beside it; the form before it."""
    state = build(plan, CPU)
    through(plan, state, "calibrate")
    through(plan, state, "fit")
    errors, rows, next_ = [], [], state.stream.next

    def watched(n: int) -> Any:
        batch = next_(n)
        seen = look(state, Raw(batch.x_BD))
        errors.append((seen.white_BD - seen.white_hat_BD).detach())
        rows.append(seen.white_BD.detach())
        return batch

    enter(plan, state, "reweigh")
    before = state.sae.form_DD.clone()
    state.stream.next = watched  # type: ignore[method-assign]
    advance(plan, state, 1000)
    state.stream.next = next_  # type: ignore[method-assign]
    return state, torch.cat(errors), torch.cat(rows), before


def test_the_form_is_the_inverse_of_what_is_left() -> None:
    """By numpy, from the rows that the phase has seen: ridge, inverse, scale."""
    plan = plan_of(phase__reweigh="{ samples = 4096, ridge = 0.1 }")
    state, error_ND, white_ND, before = reweighed(plan)
    assert len(error_ND) == 4096
    cov = np.cov(error_ND.double().numpy(), rowvar=False, bias=True)
    form = np.linalg.inv(cov + 0.1 * np.trace(cov) / len(cov) * np.eye(len(cov)))
    form *= float(state.metric.variance("white")) / np.trace(form @ np.cov(white_ND.double().numpy().T, bias=True))
    assert np.allclose(state.sae.form_DD.numpy(), form, rtol=1e-4, atol=1e-5 * form.max())
    assert not torch.allclose(before, state.sae.form_DD, rtol=0.05)
    assert state.measured["reweigh.condition"] == pytest.approx(np.linalg.cond(form), rel=1e-3)


def test_it_takes_no_step_and_no_budget() -> None:
    plan = plan_of()
    state = build(plan, CPU)
    through(plan, state, "calibrate")
    through(plan, state, "fit")
    rows, at = state.sae.W_dec_FD.detach().clone(), state.clock.step
    through(plan, state, "reweigh")
    assert state.clock.step == at
    assert torch.equal(rows, state.sae.W_dec_FD)


def test_the_term_is_a_share_of_the_variance_by_that_form() -> None:
    """Over the rows that the form is made of: mean e A e' over mean y A y', each written out; and its gradient."""
    plan = plan_of()
    state, _, white_ND, _ = reweighed(plan)
    batch = state.stream.next(512)
    seen = look(state, Raw(batch.x_BD))
    hat_BD = seen.white_hat_BD.detach().requires_grad_()
    view = view_of(state, batch, evolve(seen, white_hat_BD=White(hat_BD)))
    form_DD = state.sae.form_DD
    centred_ND = white_ND - white_ND.mean(0)
    total = torch.einsum("nd,de,ne->n", centred_ND, form_DD, centred_ND).mean()
    error_BD = (hat_BD - seen.white_BD).detach()
    by_hand = 3.0 * torch.einsum("nd,de,ne->n", error_BD, form_DD, error_BD).mean() / total
    value = RelativeMse(space="residual", weight=3.0).value(view)
    assert float(value.detach()) == pytest.approx(float(by_hand), rel=1e-3)
    value.backward()  # type: ignore[no-untyped-call]
    assert hat_BD.grad is not None
    assert torch.allclose(hat_BD.grad, 6.0 * error_BD @ form_DD / 512 / total, rtol=1e-3, atol=1e-7)


def test_a_whole_run_ends_within_its_budget_and_the_form_is_saved(tmp_path: Any) -> None:
    plan = plan_of()
    state = build(plan, CPU)
    for name in plan.recipe.phases:
        through(plan, state, name)
    assert state.clock.exhausted
    at = checkpoint.save(plan, state, tmp_path, "", {"serial": 1})
    fresh = build(plan, CPU)
    checkpoint.load(at, plan, fresh)
    assert torch.equal(fresh.sae.form_DD, state.sae.form_DD)


def test_without_refined_coefficients_it_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"activation\.refine = true"):
        plan_of(activation__refine="false")


def test_the_term_asks_for_the_phase_before_its_own() -> None:
    wanted = 'is "residual", and no phase measures that before it is used'
    with pytest.raises(RecipeError, match=wanted):
        plan_of(phases='["calibrate", "fit", "rest"]')
    early = REST.replace('"exhausted"', GATE)
    with pytest.raises(RecipeError, match=wanted):
        plan_of(
            phases='["calibrate", "rest", "reweigh", "fit"]',
            phase__rest=early,
            phase__fit=HALF.replace(GATE, '"exhausted"'),
        )


def test_a_dictionary_that_leaves_nothing_gets_a_form_without_a_shape() -> None:
    form_DD = Reweigh()._form(torch.zeros(4, 4).double(), torch.eye(4).double())
    assert bool(form_DD.isfinite().all())
    assert torch.allclose(form_DD / form_DD[0, 0], torch.eye(4).double())


def test_samples_follow_the_width() -> None:
    plan = plan_of(phase__reweigh="{}")
    phase = plan.recipe.phase["reweigh"]
    assert isinstance(phase, Reweigh)
    assert phase.samples == 200 * 16


@pytest.mark.slow
def test_both_backends_go_through_it_alike(tmp_path: Any) -> None:
    """From one checkpoint: the form reaches the lists' refinement, and the term its products, as in plain torch."""
    small = {"budget__batch": "8", "budget__tokens": "80", "filter__every": "1", "phase__reweigh": "{ samples = 16 }"}
    plan = plan_of(kernel='{ use = "torch" }', **small)
    state = build(plan, CPU)
    through(plan, state, "calibrate")
    through(plan, state, "fit")
    at = checkpoint.save(plan, state, tmp_path, "", {"serial": 1})
    ended = {}
    for kernel in ('{ use = "torch" }', '{ use = "triton", compute = "float32", replay = false }'):
        plan = plan_of(kernel=kernel, **small)
        state = build(plan, CPU)
        checkpoint.load(at, plan, state)
        through(plan, state, "reweigh")
        through(plan, state, "rest")
        assert state.clock.exhausted
        ended[state.sae.machine.ops.name] = (state.sae.form_DD, state.sae.W_dec_FD.detach())
    (form_DD, rows_FD), (other_DD, others_FD) = ended["torch"], ended["triton"]
    assert torch.allclose(form_DD, other_DD, rtol=0, atol=1e-4 * float(form_DD.abs().max()))
    assert torch.allclose(rows_FD, others_FD, rtol=0, atol=1e-4)
