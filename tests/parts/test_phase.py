"""Phases: conformance; what `calibrate` settles, and what `constrained` carries from one stretch to the next.

Shapes as in spalf/core/values.py; M constraints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import attrs
import numpy as np
import pytest
import torch
from attrs import evolve
from torch import Tensor

from spalf.core import tree
from spalf.core.recipe import Plan
from spalf.core.slots import label
from spalf.core.state import TrainingState
from spalf.core.values import View, White
from spalf.engine import control, initialise
from spalf.engine.build import build
from spalf.parts import phase as module
from spalf.parts.phase import Calibrate, Constrained
from spalf.testing import conform, toy_plan
from spalf.testing.whole import CPU, advance, enter, language_plan, moved, snapshot, through

PHASES = [cls for cls in vars(module).values() if isinstance(cls, type) and "__spalf__" in vars(cls)]
CHECKS = [pytest.param(check, id=f"{label(cls).use}-{check.__name__}") for cls in PHASES for check in conform(cls)]


@pytest.mark.parametrize("check", CHECKS)
def test_conforms(check: Callable[[], None]) -> None:
    check()


def test_all_are_here() -> None:
    assert {label(cls).use for cls in PHASES} == {"calibrate", "constrained", "resampling", "reweigh"}


# --------------------------------------------------------------------------------------------------------- calibrate
def calibrated(**sets: str) -> tuple[Plan, TrainingState]:
    plan = toy_plan(**sets)
    state = build(plan, CPU)
    through(plan, state, "calibrate")
    return plan, state


def rows_of(plan: Plan, n: int) -> Tensor:
    """The first `n` rows that a run of this plan sees."""
    return plan.recipe.source.open(plan.recipe.seed, CPU).next(n).x_BD


def test_moments_are_those_of_two_passes() -> None:
    """Chan's merge of 128 rows at a time, on data with a mean 30 times its spread."""
    plan, state = calibrated(source__bias="200.0")
    n = int(state.measured["calibrate.tokens"])
    x = rows_of(plan, n).double().numpy()
    mean, covariance = x.mean(0), np.cov(x.T, bias=True)
    assert np.abs(mean).max() > 10 * x.std(0).max()
    own = state.phase.convergence.moments
    np.testing.assert_allclose(own.mean_D.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(own.scatter_DD.numpy() / n, covariance, atol=1e-9)
    # and the whitener holds them: W^-1 W^-1 = S + alpha I, tr S
    variances = np.linalg.eigvalsh(covariance)
    assert float(state.metric.variance("raw")) == pytest.approx(variances.sum(), rel=1e-5)
    eye_DD = White(torch.eye(plan.facts.d_model))
    inverse = state.metric.raw_direction(eye_DD).double().numpy()
    alpha = state.measured["whitener.alpha"]
    np.testing.assert_allclose(inverse @ inverse, covariance + alpha * np.eye(len(mean)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(state.metric.raw(White(torch.zeros(len(mean)))).numpy(), mean, rtol=1e-6)


@pytest.mark.parametrize(
    ("sets", "converged", "tokens"),
    [
        ({"phase__calibrate__samples": "1024"}, 0.0, 1024),  # the maximum, long before 1e-3
        ({"phase__calibrate__tolerance": "0.5"}, 1.0, 512),  # the second snapshot: d^2 = 256 rows apart, >= 10 d
    ],
)
def test_the_verdict_is_recorded(sets: dict[str, str], converged: float, tokens: int) -> None:
    plan, state = calibrated(**sets)
    assert state.measured["calibrate.converged"] == converged
    assert state.measured["calibrate.tokens"] == tokens
    assert (state.measured["calibrate.change"] < plan.recipe.phase["calibrate"].tolerance) is bool(converged)
    assert state.phase.finished


def test_takes_no_gradient_and_spends_no_budget() -> None:
    _, state = calibrated()
    assert state.clock.step == 0
    assert dict(state.learner.optimizer.state) == {}
    assert all(p.grad is None for _, p in state.sae.named_parameters())


@pytest.mark.slow
def test_rows_are_unit_and_tied() -> None:
    for plan in (toy_plan(), language_plan()):
        state = build(plan, CPU)
        through(plan, state, "calibrate")
        norm_F = state.sae.W_dec_FD.detach().norm(dim=-1)
        assert torch.allclose(norm_F, torch.ones_like(norm_F), atol=1e-6)
        assert torch.equal(state.sae.W_enc_FD, state.sae.W_dec_FD)
        # s_rel = lr sqrt(d) / |row|: what folding a gain into the encoder used to break
        assert plan.knobs.lr * plan.facts.d_model**0.5 / float(norm_F.min()) < 0.2


def test_norms_hold_after_every_step() -> None:
    plan, state = calibrated()
    enter(plan, state, "fit")
    for _ in range(5):
        advance(plan, state, 1)
        norm_F = state.sae.W_dec_FD.detach()[state.sae.rows["free"]].norm(dim=-1)
        assert torch.allclose(norm_F, torch.ones_like(norm_F), atol=1e-6)


def test_thresholds_hit_the_asked_density() -> None:
    plan, state = calibrated(activation__start="2.0")
    assert initialise.start_density(plan) == 2 * 6 / 64
    x_BD = state.stream.held_out().next(20_000).x_BD
    share_F = state.sae.encode(state.metric.white(x_BD)).fired_F() / 20_000
    # the quantile of 8192 rows: a standard error of sqrt(q (1 - q) / 8192) = 0.0043, and 0.0028 here
    assert float((share_F - 0.1875).abs().max()) < 4.5 * 0.0052
    assert float(share_F.mean()) == pytest.approx(0.1875, abs=0.002)


def test_a_density_rests_on_twenty_exceedances() -> None:
    assert initialise.sample_size(0.1) == 8192
    assert initialise.sample_size(1 / 2000) == 40_000
    assert initialise.sample_size(1e-9) == 131_072
    assert initialise.start_density(toy_plan(activation__start="100.0")) == 0.5


def test_the_gain_is_least_squares() -> None:
    """<y, r> / <r, r> of the very sample; any other gain leaves a larger error."""
    plan, state = calibrated()
    n = int(state.measured["calibrate.tokens"])
    x_BD = rows_of(plan, n + 8192)[n:]
    white_BD = state.metric.white(x_BD)
    z_BF = state.sae.encode(white_BD).dense().detach().double().numpy()
    r, y = z_BF @ state.sae.W_dec_FD.detach().double().numpy(), white_BD.double().numpy()
    gain = float((y * r).sum() / (r * r).sum())
    assert state.measured["gain"] == pytest.approx(gain, rel=1e-5)
    assert float(state.sae.log_gain.detach().exp()) == pytest.approx(gain, rel=1e-5)
    best = ((y - gain * r) ** 2).sum()
    assert all(((y - factor * gain * r) ** 2).sum() > best for factor in (0.98, 1.02))


@pytest.mark.slow
def test_anchors_are_kept_in_the_state() -> None:
    plan = language_plan()
    state = build(plan, CPU)
    assert state.anchors == {}
    through(plan, state, "calibrate")
    anchor = state.anchors["anchored"]
    assert anchor.directions_AD.shape == (plan.rows["anchored"], plan.facts.d_model)
    assert torch.allclose(anchor.directions_AD.norm(dim=-1), torch.ones(plan.rows["anchored"]), atol=1e-5)
    assert len(set(anchor.ids_A.tolist())) == plan.rows["anchored"]


# ------------------------------------------------------------------------------------------------------- constrained
class Counted:
    """A constraint that counts how often its budget is asked for."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, part: Any) -> None:
        self.part, self.partial, self.dense, self.budgets = part, part.partial, part.dense, 0

    def budget(self, view: View) -> Tensor:
        self.budgets += 1
        assert not torch.is_grad_enabled()
        return self.part.budget(view)

    def value(self, view: View) -> Tensor:
        return self.part.value(view)


def two_stretches(**second: Any) -> tuple[Plan, dict[str, Counted]]:
    """`fit` under faithfulness, then `more` under what `second` says; orthogonality is the other constraint."""
    plan = toy_plan(
        phases='["calibrate", "fit", "more"]',
        phase__fit__gate="feasible",
        phase__more='{ use = "constrained", constraints = ["orthogonality"], gate = "exhausted" }',
    )
    counted = {name: Counted(part) for name, part in plan.recipe.constraint.items()}
    phases = dict(plan.recipe.phase)
    phases["fit"] = evolve(phases["fit"], constraints=("faithfulness",))
    phases["more"] = evolve(phases["more"], **{"constraints": ("faithfulness", "orthogonality"), **second})
    return evolve(plan, recipe=evolve(plan.recipe, phase=phases, constraint=counted)), counted


def fitted(plan: Plan, steps: int = 10) -> TrainingState:
    """The state after the first tick of the dual side, whose multiplier is above 0."""
    state = build(plan, CPU)
    through(plan, state, "calibrate")
    enter(plan, state, "fit")
    advance(plan, state, steps)
    return state


FAITHFULNESS, ORTHOGONALITY = 0, 1


def test_a_budget_is_measured_once() -> None:
    plan, counted = two_stretches()
    assert plan.constraints == ("faithfulness", "orthogonality")
    state = fitted(plan)
    assert counted["faithfulness"].budgets == 1
    assert counted["orthogonality"].budgets == 0
    before = state.control
    assert before.on_M.tolist() == [True, False]
    assert state.measured["faithfulness.budget"] == float(before.budget_M[FAITHFULNESS])
    assert float(before.budget_M[FAITHFULNESS]) == pytest.approx(0.2 * float(state.metric.variance("raw")))
    assert float(before.lam_M[FAITHFULNESS]) > 0
    enter(plan, state, "more")
    advance(plan, state, 20)
    assert [counted[name].budgets for name in plan.constraints] == [1, 1]
    assert state.control.budget_M[FAITHFULNESS] == before.budget_M[FAITHFULNESS]
    assert state.measured["orthogonality.budget"] == float(state.control.budget_M[ORTHOGONALITY]) != 1.0


def test_entering_changes_the_entering_ones_alone() -> None:
    plan, _ = two_stretches()
    state = fitted(plan)
    before = state.control
    model = {k: v for k, v in snapshot(state).items() if k.startswith("learner.")}
    enter(plan, state, "more")
    after = state.control
    stays = torch.tensor([True, False])
    for part in ("filter", "dual", "penalty"):
        one, two = (tree.flatten(getattr(c, part)) for c in (before, after))
        for name, value in two.items():
            if isinstance(value, Tensor) and value.shape == stays.shape:
                assert torch.equal(value[stays], one[name][stays]), (part, name)
    assert after.on_M.tolist() == [True, True]
    # the newcomer starts at its first violation, not at 0
    seen = plan.recipe.filter.signal(after.filter, torch.zeros(2), after.on_M)
    assert float(seen.fast_M[ORTHOGONALITY]) == pytest.approx(state.measured["orthogonality.entered_at"])
    assert state.measured["orthogonality.entered_at"] != 0.0
    assert float(after.lam_M[ORTHOGONALITY]) == 0.0
    assert not moved(model, {k: v for k, v in snapshot(state).items() if k.startswith("learner.")})


def test_a_constraint_that_leaves_is_off() -> None:
    plan, _ = two_stretches(constraints=("orthogonality",))
    state = fitted(plan)
    lam = state.control.lam_M.clone()
    enter(plan, state, "more")
    reading = plan.recipe.phase["more"].step(plan, state)
    assert state.control.on_M.tolist() == [False, True]
    assert float(reading.per_constraint["g"][FAITHFULNESS]) == 0.0
    advance(plan, state, 20)
    assert state.control.lam_M[FAITHFULNESS] == lam[FAITHFULNESS]


def test_handover_carries_multiplier_and_penalty() -> None:
    plan, _ = two_stretches(constraints=("orthogonality",), handover={"faithfulness": "orthogonality"})
    plan = evolve(plan, recipe=evolve(plan.recipe, penalty=evolve(plan.recipe.penalty, rho=3.0)))
    state = fitted(plan)
    lam, rho = state.control.lam_M[FAITHFULNESS], state.control.rho_M[FAITHFULNESS]
    # a penalty of its own, so that carrying it over shows
    state.control = evolve(state.control, penalty=evolve(state.control.penalty, rho_M=torch.tensor([2.5, 3.0])))
    assert float(lam) > 0
    assert float(rho) == 3.0
    enter(plan, state, "more")
    assert state.control.lam_M[ORTHOGONALITY] == lam
    assert float(state.control.rho_M[ORTHOGONALITY]) == 2.5
    seen = plan.recipe.filter.signal(state.control.filter, torch.zeros(2), state.control.on_M)
    assert float(seen.fast_M[ORTHOGONALITY]) == pytest.approx(state.measured["orthogonality.entered_at"])


@pytest.mark.parametrize("hold", [(), ("dual",), ("penalty",), ("dual", "penalty")])
def test_hold(hold: tuple[str, ...]) -> None:
    from spalf.parts.penalty import Capu

    plan, _ = two_stretches(hold=hold)
    plan = evolve(plan, recipe=evolve(plan.recipe, penalty=Capu()))
    state = fitted(plan)
    enter(plan, state, "more")
    before = state.control
    advance(plan, state, 30)
    lam_moved = not torch.equal(before.lam_M, state.control.lam_M)
    rho_moved = not torch.equal(before.rho_M, state.control.rho_M)
    assert (lam_moved, rho_moved) == ("dual" not in hold, "penalty" not in hold)


def test_measuring_a_budget_leaves_no_graph_and_one_batch_behind() -> None:
    plan, _ = two_stretches()
    state = build(plan, CPU)
    through(plan, state, "calibrate")
    cursor = state.stream.state_dict()
    enter(plan, state, "fit")
    assert all(not t.requires_grad for t in tree.flatten(state.control).values() if isinstance(t, Tensor))
    other = plan.recipe.source.open(plan.recipe.seed, CPU)
    other.load_state_dict(cursor)
    other.next(plan.recipe.budget.batch)
    assert state.stream.state_dict() == other.state_dict()


def test_nothing_enters_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = two_stretches(constraints=("faithfulness",))
    state = fitted(plan)
    monkeypatch.setattr(control, "enter", lambda *_: pytest.fail("nothing enters here"))
    cursor, before = state.stream.state_dict(), state.control
    enter(plan, state, "more")
    assert state.stream.state_dict() == cursor
    assert not moved(tree.flatten(before), tree.flatten(state.control))


def test_options_are_as_documented() -> None:
    assert attrs.fields(Constrained).terms.default == ("l0",)
    with pytest.raises(ValueError, match="samples"):
        Calibrate(samples=0)
    row = Calibrate(tolerance=0.01, samples=5000).derive(toy_plan())[0]
    assert row.value is None
    assert row.formula == "until the covariance changes by < 0.01, at least 10 d_model, at most 5,000"
