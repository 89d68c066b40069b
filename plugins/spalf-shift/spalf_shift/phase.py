"""Phase `cooper`: the constrained loop by Cooper's optimizers, and budgets that tighten on a straight line.

Shapes: M constraints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from attrs import evolve, field, frozen
from attrs.validators import deep_iterable, ge, gt, in_, instance_of, min_len
from cooper.cmp import CMPState, ConstrainedMinimizationProblem
from cooper.constraints.constraint import Constraint
from cooper.constraints.constraint_state import ConstraintState
from cooper.multipliers.multipliers import DenseMultiplier
from cooper.optim.constrained_optimizers.extrapolation_optimizer import ExtrapolationConstrainedOptimizer
from cooper.optim.constrained_optimizers.simultaneous_optimizer import SimultaneousOptimizer
from cooper.utils.annotations import ConstraintType
from torch import Tensor

from spalf import Assessment, Batch, Derived, Plan, Reading, TrainingState, assess, conclude, phase, switch_on
from spalf_shift.dual import Cooper, weight_of
from spalf_shift.primal import Extrapolated

WARM_SHARE, RAMP_SHARE = 2 / 15, 1 / 3
"""2,000 and 5,000 of 15,000 epochs: the published lengths as shares of a run, here counted in steps."""

EXAMPLES = {("phase", "cooper"): {"terms": ("l0",), "constraints": ("faithfulness", "orthogonality")}}
PLANS = {("phase", "cooper"): {"dual": '"cooper"'}}


class Minimisation(ConstrainedMinimizationProblem):
    """Cooper's view of one step: the terms of a batch, and all violations as one constraint with M multipliers."""

    def __init__(
        self, plan: Plan, state: TrainingState, names: tuple[tuple[str, ...], tuple[str, ...]], lam: DenseMultiplier
    ) -> None:
        super().__init__()
        self.bound = Constraint(constraint_type=ConstraintType.INEQUALITY, multiplier=lam)
        self._plan, self._training, self._names = plan, state, names
        self._law = cast(Cooper, plan.recipe.dual)
        self.passes: list[Assessment] = []

    def compute_cmp_state(self, batch: Batch) -> CMPState:
        """Look at the batch with the parameters as they are now."""
        terms, constraints = self._names
        seen = assess(self._plan, self._training, batch, terms, constraints)
        self.passes.append(seen)
        g_M = seen.measures.violations.g_M
        violation = ConstraintState(violation=g_M, strict_violation=self._law.error(g_M))
        return CMPState(loss=seen.measures.objective(), observed_constraints={self.bound: violation})


@frozen(kw_only=True, eq=False)
class RampState:
    """Each constraint's budget at the start of the ramp and at its end, [M]; 1 where none has been measured."""

    start_M: Tensor
    end_M: Tensor


@phase("cooper")
class CooperPhase:
    """Minimise `terms` subject to `constraints` by Cooper (arXiv 2504.01212), until the run's budget is spent.

    `warmup` steps without constraints, then each budget goes linearly, over `ramp` steps, from the value that its
    constraint has at that moment to its own: level(t) = l_0 + min(1, t / ramp) (target - l_0). l_0 is measured, because
    a ramp from above it is slack at first, and where the value is below the target already there is no ramp. 0 derives
    2/15 and 1/3 of the run's steps (arXiv 2502.12179).

    `scheme` "extrapolation": a half step of parameters and multipliers, then the gradients there, applied from the old
    point; two passes over one batch, and it converges where descent and ascent at once cycle. The optimizer is the
    recipe's, its moments moved once per step. "simultaneous": one pass, both sides at once, with nuPI if the dual's kp
    is set. The multipliers are those of the dual "cooper", moved at every step by the batch's own dimensionless
    violations; the filter is for show, and neither penalty nor lagrangian has a part in this phase.
    """

    terms: tuple[str, ...] = field(validator=deep_iterable(instance_of(str), min_len(1)))
    constraints: tuple[str, ...] = field(validator=deep_iterable(instance_of(str), min_len(1)))
    scheme: str = field(default="extrapolation", validator=in_(("extrapolation", "simultaneous")))
    warmup: int = field(default=0, validator=ge(0))
    ramp: int = field(default=0, validator=ge(0))
    rate: float = field(default=1.0, validator=gt(0.0))

    def settle(self, plan: Plan) -> CooperPhase:
        """With warm-up and ramp filled in. Raises ValueError where they do not fit, or the recipe has another dual."""
        law = plan.recipe.dual
        if not isinstance(law, Cooper):
            raise ValueError('this phase moves the multipliers of the dual "cooper" (set dual = "cooper")')
        if self.scheme == "extrapolation" and law.kp > 0:
            raise ValueError("a half step is plain ascent: dual.kp has no effect (set it to 0, or another scheme)")
        total = plan.total_steps
        warmup = self.warmup or max(1, round(WARM_SHARE * total))
        ramp = self.ramp or max(1, round(RAMP_SHARE * total))
        if warmup + ramp > total:
            raise ValueError(
                f"warmup + ramp = {warmup + ramp} steps, but the run has {total}: its targets would never be in force "
                "(shorten them or raise budget.tokens)"
            )
        settled: CooperPhase = evolve(cast(Any, self), warmup=warmup, ramp=ramp)
        return settled

    def derive(self, plan: Plan) -> list[Derived]:
        """Rows for `spalf compile`: when constraints begin, and when their budgets are the recipe's."""
        begin = Derived(path="warmup", value=float(self.warmup), formula="2/15 of the steps, or given", origin="phase")
        end = Derived(path="ramp", value=float(self.ramp), formula="1/3 of the steps, or given", origin="phase")
        return [begin, end]

    def init(self, plan: Plan) -> RampState:
        one_M = torch.ones(len(plan.constraints))
        return RampState(start_M=one_M, end_M=one_M.clone())

    def enter(self, plan: Plan, state: TrainingState) -> None:
        """Every constraint is off until the warm-up is over."""
        state.control = evolve(state.control, on_M=torch.zeros_like(state.control.on_M))

    def step(self, plan: Plan, state: TrainingState) -> Reading:
        since = state.clock.step - state.clock.entered - self.warmup
        if since == 0:
            self._begin(plan, state)
        active = self.constraints if since >= 0 else ()
        if active:
            self._tighten(state, since)
        return self._roll(plan, state, active)

    def done(self, plan: Plan, state: TrainingState) -> bool:
        return state.clock.exhausted

    def _begin(self, plan: Plan, state: TrainingState) -> None:
        """Measure budgets and values on one batch; the ramp starts at the greater of the two."""
        switch_on(plan, state, self.constraints)
        start_M = state.control.budget_M.clone()
        for i, name in enumerate(plan.constraints):
            if name in self.constraints:
                start_M[i] *= max(0.0, state.measured[f"{name}.entered_at"]) + 1.0  # value = (g + 1) budget
                state.measured[f"{name}.ramp_from"] = float(start_M[i])
        state.phase = RampState(start_M=start_M, end_M=state.control.budget_M.clone())

    def _tighten(self, state: TrainingState, since: int) -> None:
        ramp: RampState = state.phase
        share = min(1.0, since / self.ramp)
        level_M = ramp.start_M + share * (ramp.end_M - ramp.start_M)
        budget_M = torch.where(state.control.on_M, level_M, state.control.budget_M)
        state.control = evolve(state.control, budget_M=budget_M)

    def _roll(self, plan: Plan, state: TrainingState, active: tuple[str, ...]) -> Reading:
        """One step of both sides on one batch."""
        law = cast(Cooper, plan.recipe.dual)
        before = state.control.dual
        lam = law.multiplier(before.lam_M)
        problem = Minimisation(plan, state, (self.terms, active), lam)
        primal: Any = Extrapolated(state.learner, state.clock, self.rate)
        batch = state.stream.next(plan.recipe.budget.batch)
        if self.scheme == "extrapolation":
            dual: torch.optim.Optimizer = law.ascent(weight_of(lam))
            out = ExtrapolationConstrainedOptimizer(problem, primal, dual).roll({"batch": batch})
        else:
            dual = law.controller(before, weight_of(lam), torch.zeros_like(before.lam_M))
            out = SimultaneousOptimizer(problem, primal, dual).roll({"batch": batch})
        loss = out.primal_lagrangian_store.lagrangian
        assert loss is not None, "a phase has a term"
        reading, _ = conclude(plan, state, problem.passes[0], loss.detach(), hold=("dual", "penalty"))
        moved = law.closed(before, lam, dual, state.control.on_M)
        state.control = evolve(state.control, dual=moved)
        return evolve(reading, per_constraint=_with(reading.per_constraint, lam=moved.lam_M))


def _with(values: Mapping[str, Tensor], **changed: Tensor) -> dict[str, Tensor]:
    return {**values, **changed}
