"""Phase `cooper`: a half step converges where descent and ascent cycle, rows are unit, budgets come down a line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cooper.cmp import CMPState, ConstrainedMinimizationProblem
from cooper.constraints.constraint import Constraint
from cooper.constraints.constraint_state import ConstraintState
from cooper.optim.constrained_optimizers.extrapolation_optimizer import ExtrapolationConstrainedOptimizer
from cooper.optim.constrained_optimizers.simultaneous_optimizer import SimultaneousOptimizer
from cooper.utils.annotations import ConstraintType
from spalf_shift.dual import Cooper, weight_of
from spalf_shift.primal import Extrapolated
from torch import nn

from spalf import Clock, RecipeError, TrainingState
from spalf.testing import started, toy_plan


class Game:
    """As much of a learner as a step asks for: one parameter x and its optimizer."""

    def __init__(self, optimizer: type[torch.optim.Optimizer], **options: Any) -> None:
        self.x = nn.Parameter(torch.tensor([1.0]))
        self.sae = self
        self.optimizer = optimizer([self.x], **options)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [("x", self.x)]

    def advance(self, clock: Clock, rate: float) -> None:
        self.optimizer.step()


class Bilinear(ConstrainedMinimizationProblem):
    """min -x subject to x <= 0: its Lagrangian (lam - 1) x is bilinear, with the saddle at x = 0, lam = 1."""

    def __init__(self, game: Game, multiplier: Any) -> None:
        super().__init__()
        self.bound = Constraint(constraint_type=ConstraintType.INEQUALITY, multiplier=multiplier)
        self.game = game

    def compute_cmp_state(self) -> CMPState:
        x = self.game.x
        return CMPState(loss=-x.sum(), observed_constraints={self.bound: ConstraintState(violation=x)})


def distance(scheme: str, steps: int = 600) -> float:
    """The least one from the saddle in the last two thirds of the steps; it begins at sqrt(1 + 0.25)."""
    law, game, lam_M = Cooper(rate=0.1), Game(torch.optim.SGD, lr=0.1), torch.tensor([1.5])
    out = []
    for _ in range(steps):
        multiplier = law.multiplier(lam_M)
        problem, primal = Bilinear(game, multiplier), cast_primal(game)
        if scheme == "extrapolation":
            dual: Any = law.ascent(weight_of(multiplier))
            ExtrapolationConstrainedOptimizer(problem, primal, dual).roll()
        else:
            dual = law.controller(law.init(1), weight_of(multiplier), torch.zeros(1))
            SimultaneousOptimizer(problem, primal, dual).roll()
        lam_M = weight_of(multiplier).detach()
        out.append(float((game.x.detach().square() + (lam_M - 1).square()).sum().sqrt()))
    return min(out[steps // 3 :])


def cast_primal(game: Game) -> Any:
    learner: Any = game
    return Extrapolated(learner, Clock(), 1.0)


def test_a_half_step_converges_where_descent_and_ascent_cycle() -> None:
    assert distance("simultaneous") > 0.9, "plain descent and ascent come no nearer"
    assert distance("extrapolation") < 0.1


def test_moments_are_moved_once_by_the_second_gradient() -> None:
    game = Game(torch.optim.Adam, lr=0.1, betas=(0.5, 0.5))
    primal = cast_primal(game)
    game.x.grad = torch.tensor([3.0])
    primal.extrapolation()
    assert game.x.item() == pytest.approx(0.9)  # Adam's first step is of its rate
    assert not game.optimizer.state, "the half step leaves no moments behind"
    game.x.grad = torch.tensor([-1.0])
    primal.step()
    kept = game.optimizer.state[game.x]
    assert float(kept["step"]) == 1.0
    assert float(kept["exp_avg"]) == -0.5
    assert game.x.item() == pytest.approx(1.1), "applied from the old point"


def test_the_half_step_remembers_moments_that_there_were() -> None:
    game = Game(torch.optim.Adam, lr=0.1)
    primal = cast_primal(game)
    for gradient in (1.0, 2.0, 5.0):
        game.x.grad = torch.tensor([gradient])
        primal.extrapolation()
        primal.step()
    plain = Game(torch.optim.Adam, lr=0.1)
    for gradient in (1.0, 2.0, 5.0):
        plain.x.grad = torch.tensor([gradient])
        plain.optimizer.step()
    assert torch.equal(game.x, plain.x)


# ------------------------------------------------------------------------------------------------- on the toy plan
def plan_of(**options: str) -> Any:
    given = {"terms": '["l0"]', "constraints": '["faithfulness"]', **options}
    inside = ", ".join(f"{k} = {v}" for k, v in given.items())
    return toy_plan(
        dual='{ use = "cooper", rate = 0.05 }',
        term__error='{ use = "relative_mse" }',
        constraint__count='{ use = "l0_rate" }',
        phase__fit=f'{{ use = "cooper", {inside} }}',
    )


@pytest.mark.parametrize("scheme", ["extrapolation", "simultaneous"])
def test_rows_are_unit_and_gradients_tangent_at_every_step(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = {"terms": '["error"]', "constraints": '["count"]'}
    plan = plan_of(scheme=f'"{scheme}"', warmup="3", ramp="5", **error)
    state = started(plan, 0)
    seen: list[tuple[float, float]] = []
    plain, project = state.learner.optimizer.step, type(state.learner).project_

    def watched(*a: Any) -> Any:
        weight_FD, grad_FD = state.sae.W_dec_FD.detach(), state.sae.W_dec_FD.grad
        assert grad_FD is not None
        radial_F = (weight_FD * grad_FD).sum(1) / grad_FD.norm(dim=1).clamp(min=1e-12)
        seen.append((float(radial_F.abs().max()), float((weight_FD.norm(dim=1) - 1).abs().max())))
        return plain(*a)

    norms: list[float] = []

    def projected(learner: Any) -> None:
        project(learner)
        norms.append(float((state.sae.W_dec_FD.detach().norm(dim=1) - 1).abs().max()))

    monkeypatch.setattr(state.learner.optimizer, "step", watched)
    monkeypatch.setattr(type(state.learner), "project_", projected)
    for _ in range(10):
        plan.recipe.phase["fit"].step(plan, state)
    passes = 2 if scheme == "extrapolation" else 1
    assert len(seen) == len(norms) == 10 * passes
    assert max(radial for radial, _ in seen) < 1e-5, "a gradient had a radial part when the step was taken"
    assert max(norm for _, norm in seen) < 1e-6, "a step began from rows that were not unit"
    assert max(norms) < 1e-6


def budgets(state: TrainingState, plan: Any, steps: int) -> list[float]:
    out = []
    for _ in range(steps):
        plan.recipe.phase["fit"].step(plan, state)
        out.append(float(state.control.budget_M[0]))
    return out


def test_the_budget_comes_down_a_straight_line_from_what_was_measured() -> None:
    plan = plan_of(warmup="4", ramp="10")
    state = started(plan, 0)
    before = budgets(state, plan, 4)
    assert before == [1.0] * 4
    assert not bool(state.control.on_M.any())
    after = budgets(state, plan, 14)
    target, start = state.measured["faithfulness.budget"], state.measured["faithfulness.ramp_from"]
    assert start > target, "it starts violated: the ramp begins at the value found"
    assert start == pytest.approx(target * (1 + state.measured["faithfulness.entered_at"]))
    line = [start + min(1.0, t / 10) * (target - start) for t in range(14)]
    assert after == pytest.approx(line, rel=1e-5)
    assert bool(state.control.on_M.any())


def test_a_target_that_is_met_already_has_no_ramp() -> None:
    plan = toy_plan(
        dual='{ use = "cooper" }',
        constraint__count='{ use = "l0_rate", target = 60 }',
        term__error='{ use = "relative_mse" }',
        phase__fit='{ use = "cooper", terms = ["error"], constraints = ["count"], warmup = 1, ramp = 50 }',
    )
    state = started(plan, 3)
    assert state.measured["count.entered_at"] < 0
    assert state.measured["count.ramp_from"] == state.measured["count.budget"] == 60.0
    assert float(state.control.budget_M[0]) == 60.0


def test_multipliers_move_at_every_step_by_their_own_law() -> None:
    plan = plan_of(warmup="1", ramp="1")
    state = started(plan, 2)
    before, violation = float(state.control.lam_M[0]), None
    reading = plan.recipe.phase["fit"].step(plan, state)
    violation = float(reading.per_constraint["g"][0])
    assert float(state.control.lam_M[0]) > before >= 0.0
    assert violation > 0
    assert torch.equal(reading.per_constraint["lam"], state.control.lam_M)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ({"dual": '"pi"'}, 'phase.fit: this phase moves the multipliers of the dual "cooper"'),
        ({"dual": '{ use = "cooper", kp = 1.0 }'}, "a half step is plain ascent"),
        ({"dual": '"cooper"', "phase__fit__ramp": "99"}, "phase.fit: warmup \\+ ramp = 112 steps, but the run has 100"),
    ],
)
def test_what_does_not_fit_is_refused(sets: dict[str, str], said: str) -> None:
    phase = '{ use = "cooper", terms = ["l0"], constraints = ["faithfulness"] }'
    with pytest.raises(RecipeError, match=said):
        toy_plan(**{"phase__fit": phase, **sets})


def test_lengths_are_derived_in_steps() -> None:
    plan = plan_of()
    phase: Any = plan.recipe.phase["fit"]
    assert (phase.warmup, phase.ramp) == (13, 33)  # 2/15 and 1/3 of 100
    assert {row.path for row in plan.derived} >= {"phase.fit.warmup", "phase.fit.ramp"}


def test_both_schemes_bring_the_error_into_its_budget() -> None:
    for scheme in ("extrapolation", "simultaneous"):
        plan = plan_of(scheme=f'"{scheme}"', warmup="5", ramp="20")
        state = started(plan, 100)
        assert float(state.control.filter.fast_M[0]) < 0.1, scheme
