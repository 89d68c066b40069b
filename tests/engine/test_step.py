"""One step: what is measured, what descends, what is refused, and what is told.

Shapes as in spalf/core/values.py; M constraints: faithfulness, then orthogonality.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from attrs import evolve, frozen
from torch import Tensor

from spalf.core.mesh import Mesh
from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.values import Raw, View
from spalf.engine import logged, step
from spalf.engine.build import build
from spalf.errors import DeadConstraintError
from spalf.testing import toy_plan
from spalf.testing.whole import CPU, enter, moved, snapshot, through

TERMS, BOTH = ("l0",), ("faithfulness", "orthogonality")


@pytest.fixture
def ready() -> tuple[Plan, TrainingState]:
    """A state in which `fit` has been entered and no step taken."""
    plan = toy_plan()
    state = build(plan, CPU)
    through(plan, state, "calibrate")
    enter(plan, state, "fit")
    return plan, state


def seen(plan: Plan, state: TrainingState, dense: bool = False) -> View:
    batch = state.stream.next(plan.recipe.budget.batch)
    return step.view_of(state, batch, step.look(state, batch.x_BD, dense))


# ------------------------------------------------------------------------------------------------------------ measure
def test_g_is_value_over_budget_less_one(ready: tuple[Plan, TrainingState]) -> None:
    plan, state = ready
    state.control = evolve(state.control, budget_M=torch.tensor([2.0, 0.25]))
    view = seen(plan, state)
    draws = state.rng.state_dict()
    measures = step.measure(plan, state, view, TERMS, BOTH)
    state.rng.load_state_dict(draws)
    values = [float(plan.recipe.constraint[name].value(view).detach()) for name in BOTH]
    assert measures.violations.names == BOTH
    assert measures.violations.g_M.tolist() == pytest.approx([values[0] / 2.0 - 1, values[1] / 0.25 - 1], rel=1e-6)
    assert measures.violations.g_M.dtype == torch.float32
    assert measures.violations.g_M.requires_grad
    assert measures.objective() == measures.terms["l0"]


@pytest.mark.parametrize("on", [("faithfulness",), ("orthogonality",), ()])
def test_off_constraints_are_0_and_not_measured(ready: tuple[Plan, TrainingState], on: tuple[str, ...]) -> None:
    plan, state = ready
    parts = {n: plan.recipe.constraint[n] if n in on else Refusing() for n in BOTH}
    plan = evolve(plan, recipe=evolve(plan.recipe, constraint=parts))
    g_M = step.measure(plan, state, seen(plan, state), TERMS, on).violations.g_M
    assert [g != 0 for g in g_M.tolist()] == [n in on for n in BOTH]
    assert g_M.requires_grad is bool(on)


def test_the_objective_is_the_sum_of_the_terms(ready: tuple[Plan, TrainingState]) -> None:
    plan, state = ready
    terms = {**plan.recipe.term, "a": Constant(value_=2.0), "b": Constant(value_=0.5)}
    plan = evolve(plan, recipe=evolve(plan.recipe, term=terms))
    measures = step.measure(plan, state, seen(plan, state), ("b", "l0", "a"), ())
    assert float((measures.objective() - measures.terms["l0"]).detach()) == pytest.approx(2.5)
    assert measures.violations.g_M.tolist() == [0.0, 0.0]


@frozen(kw_only=True)
class Constant:
    """A term of a fixed value, with a graph to the gain."""

    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    value_: float

    def value(self, view: View) -> Tensor:
        return self.value_ + 0.0 * view.sae.log_gain


class Refusing:
    """A constraint that nobody may ask."""

    needs: ClassVar[frozenset[str]] = frozenset()
    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = True

    def budget(self, view: View) -> Tensor:
        raise AssertionError("an inactive constraint was measured")

    value = budget


class Doubling(Mesh):
    """Two shards that hold the same part."""

    def sum(self, x: Tensor) -> Tensor:
        return 2 * x


@frozen(kw_only=True)
class Partial(Constant):
    partial: ClassVar[bool] = True


def test_partial_values_are_summed_over_shards(ready: tuple[Plan, TrainingState]) -> None:
    plan, state = ready
    plan = evolve(plan, recipe=evolve(plan.recipe, term={"whole": Constant(value_=3.0), "part": Partial(value_=3.0)}))
    view = seen(plan, state)
    state.sae.machine = evolve(state.sae.machine, mesh=Doubling())
    terms = step.measure(plan, state, view, ("part", "whole"), ()).terms
    assert {k: float(v.detach()) for k, v in terms.items()} == {"part": 6.0, "whole": 3.0}


def test_dense_codes_only_where_a_part_needs_them() -> None:
    plan = toy_plan(phase__fit__terms='["l0", "discretization"]')
    assert plan.recipe.term["discretization"].dense
    assert step.needs_dense(plan, ("l0", "discretization"), ())
    assert not step.needs_dense(plan, ("l0",), BOTH)
    plan = evolve(plan, recipe=evolve(plan.recipe, constraint={"faithfulness": Refusing()}))
    assert step.needs_dense(plan, ("l0",), ("faithfulness",))


# --------------------------------------------------------------------------------------------------- what never trains
class Detached:
    """A part whose value has lost its graph."""

    def __init__(self, part: Any) -> None:
        self.part = part
        self.needs, self.partial, self.dense = getattr(part, "needs", frozenset()), part.partial, part.dense

    def budget(self, view: View) -> Tensor:
        return self.part.budget(view)

    def value(self, view: View) -> Tensor:
        return self.part.value(view).detach()


def with_detached(plan: Plan, *names: str) -> Plan:
    recipe = plan.recipe
    constraint = {n: Detached(p) if n in names else p for n, p in recipe.constraint.items()}
    term = {n: Detached(p) if n in names else p for n, p in recipe.term.items()}
    return evolve(plan, recipe=evolve(recipe, constraint=constraint, term=term))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("orthogonality",), 'constraint "orthogonality": the value depends on no parameter'),
        (("faithfulness",), 'constraint "faithfulness": the value'),
        (("l0",), 'term "l0": the value'),
        (("l0", *BOTH), 'term "l0", constraint "faithfulness", constraint "orthogonality": the value'),
    ],
)
def test_a_value_without_a_graph_is_refused_by_name(
    ready: tuple[Plan, TrainingState], names: tuple[str, ...], said: str
) -> None:
    plan, state = ready
    before = snapshot(state)
    with pytest.raises(DeadConstraintError) as caught:
        step.primal_dual_step(with_detached(plan, *names), state, TERMS, BOTH)
    assert str(caught.value).startswith(said)
    assert "without detach or no_grad" in str(caught.value)
    changed = moved(before, snapshot(state))
    assert not [k for k in changed if k.startswith(("learner.", "control.", "clock."))], "nothing was trained on it"


def test_a_detached_violation_would_train_nothing(ready: tuple[Plan, TrainingState]) -> None:
    """Why it is refused: the augmented Lagrangian of a detached g has no gradient at all, and gives no sign of it."""
    plan, state = ready
    measures = step.measure(plan, state, seen(plan, state), TERMS, BOTH)
    state.control = evolve(state.control, dual=evolve(state.control.dual, lam_M=torch.ones(2)))

    def gradient(g_M: Tensor) -> float:
        loss = plan.recipe.lagrangian(0.0 * measures.objective(), evolve(measures.violations, g_M=g_M), state.control)
        found = torch.autograd.grad(loss, state.sae.W_dec_FD, retain_graph=True, allow_unused=True)[0]
        return 0.0 if found is None else float(found.abs().max())

    assert gradient(measures.violations.g_M) > 1e-3
    assert gradient(measures.violations.g_M.detach()) == 0.0


def test_only_the_first_step_of_a_phase_looks_for_dead_values(ready: tuple[Plan, TrainingState]) -> None:
    plan, state = ready
    step.primal_dual_step(plan, state, TERMS, BOTH)
    step.primal_dual_step(with_detached(plan, "orthogonality"), state, TERMS, BOTH)
    state.clock = evolve(state.clock, entered=state.clock.step)
    with pytest.raises(DeadConstraintError):
        step.primal_dual_step(with_detached(plan, "orthogonality"), state, TERMS, BOTH)


# ----------------------------------------------------------------------------------------------------------- one step
def test_a_step_moves_what_it_should(ready: tuple[Plan, TrainingState]) -> None:
    plan, state = ready
    before, cursor = snapshot(state), state.stream.state_dict()
    reading, signal = step.primal_dual_step(plan, state, TERMS, BOTH)
    changed = moved(before, snapshot(state))
    assert {k.split(".")[0] for k in changed} - {"silent_F"} == {"clock", "control", "learner", "rng", "stream"}
    for name, _ in state.sae.named_parameters():
        assert f"learner.model.{name}" in changed
    assert state.clock.step == reading.step == 1
    assert state.stream.state_dict() != cursor
    assert not signal.g_M.requires_grad
    assert not any(t.requires_grad for t in (*reading.values.values(), *reading.per_constraint.values()))
    assert "control.dual.lam_M" not in changed, "the dual side moves on ticks of the filter alone"
    for _ in range(9):
        step.primal_dual_step(plan, state, TERMS, BOTH)
    assert float(state.control.lam_M[0]) > 0


def test_rate_scales_the_schedule(ready: tuple[Plan, TrainingState]) -> None:
    plan, state = ready
    sizes = []
    for rate in (1.0, 0.25):
        step.primal_dual_step(plan, state, TERMS, BOTH, rate=rate)
        peak = plan.knobs.lr * plan.recipe.optimizer.scale(evolve(state.clock, step=state.clock.step - 1))
        sizes.append(state.learner.optimizer.param_groups[0]["lr"] / peak)
    assert sizes == pytest.approx([1.0, 0.25])


def test_silence_is_counted_in_activations(ready: tuple[Plan, TrainingState]) -> None:
    plan, state = ready
    state.learner.assign("b_enc_F", torch.tensor([-1e4] * 5 + [0.0] * 59))
    for n in (1, 2, 3):
        step.primal_dual_step(plan, state, TERMS, BOTH)
        assert state.silent_F[:5].tolist() == [128 * n] * 5
    assert int((state.silent_F[5:] == 0).sum()) > 50
    assert step.dead_window(plan) == 12_800 // 5
    assert step.dead_window(toy_plan(budget__tokens="100_000_000")) == 10_000_000


def test_a_reading_is_plain_numbers(ready: tuple[Plan, TrainingState]) -> None:
    plan, state = ready
    readings = [step.primal_dual_step(plan, state, TERMS, BOTH)[0] for _ in range(10)]
    short, long = (json.loads(json.dumps(r.scalars())) for r in (readings[0], readings[9]))
    assert set(short) == {"step", "phase", "loss", "l0", "term.l0", "constraints"}
    spread = {f"{name}.p{p:02}" for name in ("threshold", "bandwidth") for p in logged.SPREAD}
    more = {"r2_raw", "r2_white", "gain", "dead", "lr"} | spread
    assert set(long) - set(short) == more, "more only where a line is logged"
    assert 0 < long["threshold.p05"] < long["threshold.p50"] < long["threshold.p95"]
    theta_F = state.sae.activator.threshold_F().detach()
    assert long["threshold.p50"] == pytest.approx(float(torch.quantile(theta_F, 0.5)))
    assert long["bandwidth.p95"] == pytest.approx(
        2 * float(torch.quantile(theta_F - state.sae.activator.reach_F(), 0.95))
    )
    assert (long["step"], long["phase"]) == (10, "fit")
    assert set(long["constraints"]) == set(BOTH)
    assert set(long["constraints"]["faithfulness"]) == {"g", "fast", "lam", "rho", "on"}
    assert long["term.l0"] == pytest.approx(long["l0"] / plan.knobs.L0_target)
    # faithfulness is 1 - r2 over 1 - R2_target
    assert long["constraints"]["faithfulness"]["g"] == pytest.approx((1 - long["r2_raw"]) / 0.2 - 1, rel=1e-3)


def test_r2_of_a_reading_against_numpy(ready: tuple[Plan, TrainingState]) -> None:
    plan, state = ready
    plan = evolve(plan, recipe=evolve(plan.recipe, record=evolve(plan.recipe.record, log_every=1)))
    cursor = state.stream.state_dict()
    x_BD = state.stream.next(plan.recipe.budget.batch).x_BD
    hat = step.reconstructor(state)(x_BD).detach().double().numpy()
    state.stream.load_state_dict(cursor)
    reading, _ = step.primal_dual_step(plan, state, TERMS, BOTH)
    fvu = np.square(x_BD.double().numpy() - hat).sum(1).mean() / float(state.metric.variance("raw"))
    assert float(reading.values["r2_raw"]) == pytest.approx(1 - fvu, abs=1e-5)


def test_a_reconstruction_keeps_shape_and_precision(ready: tuple[Plan, TrainingState]) -> None:
    _, state = ready
    x = state.stream.next(24).x_BD
    flat = step.reconstructor(state)(x)
    deep = step.reconstructor(state)(Raw(x.reshape(2, 3, 4, 16).bfloat16()))
    assert flat.requires_grad
    assert deep.shape == (2, 3, 4, 16)
    assert deep.dtype == torch.bfloat16
    again = step.reconstructor(state)(Raw(x.bfloat16().float()))
    assert torch.equal(deep.reshape(24, 16), again.bfloat16())
