"""`reweigh`: errors count by the inverse of what the dictionary leaves so far. Shapes: B rows, D d_model."""

from __future__ import annotations

from typing import Any, cast

import torch
from attrs import evolve, field, frozen
from attrs.validators import ge, gt
from torch import Tensor

from spalf.core.recipe import Derived, Plan
from spalf.core.slots import phase
from spalf.core.state import TrainingState
from spalf.core.values import Reading
from spalf.engine import moments
from spalf.engine.step import look
from spalf.errors import Problem, RecipeError

PLANS = {("phase", "reweigh"): {"activation__refine": "true"}}
"""What the test kit's plan needs around the phase."""
PER_DIMENSION = 200
"""Activations for each dimension: entries of a covariance of D directions are then known to about 7 % of a variance."""


@frozen(kw_only=True, eq=False)
class ReweighState:
    """Moments of the errors and of the rows that they are errors of, both whitened; whether the form is in force."""

    error: moments.Moments
    data: moments.Moments
    finished: bool = False


@phase("reweigh")
class Reweigh:
    """Measures the errors' covariance R; from then on an error e counts e A e', with A ~ (R + ridge tr(R) / D I)^-1.

    These are the weights of generalised least squares (Aitken 1935). Whitening by the covariance of the data gives all
    directions the same weight, also one that varies because a frequent feature lies along it, and leaving that feature
    out then costs next to nothing. What a trained dictionary leaves has the noise's shape, and no longer the features':
    its inverse undoes a mixing of the model's dimensions as whitening does, without that fault.

    The term `relative_mse` with `space = "residual"` measures by it, and so does the refinement of coefficients, which
    this phase needs (`activation.refine`): until it, both count errors as in model space. A is scaled so that the
    variance of the data by it is tr(W S W), the one in whitened coordinates. Takes no gradient and spends no training
    budget; A's condition number is among the run's measured numbers.
    """

    samples: int = field(default=0, validator=ge(0))
    """Activations; 0: 200 for each dimension."""
    ridge: float = field(default=0.05, validator=gt(0.0))
    """What R is raised by, in its mean variance: a direction that is reconstructed exactly would weigh without end."""

    def settle(self, plan: Plan) -> Reweigh:
        """With the samples filled in. Raises RecipeError where coefficients are not refined."""
        if not getattr(plan.recipe.activation, "refine", False):
            message = "has no form to set: it is the one that coefficients are refined by, and here they are not"
            raise RecipeError([Problem("", message, "set activation.refine = true, or take the phase out of `phases`")])
        settled: Reweigh = evolve(cast(Any, self), samples=self.samples or PER_DIMENSION * plan.facts.d_model)
        return settled

    def derive(self, plan: Plan) -> list[Derived]:
        """The samples' row for `spalf compile`."""
        formula = f"{PER_DIMENSION} * d_model, or as given"
        return [Derived(path="samples", value=self.samples, formula=formula, origin="phase.samples")]

    def init(self, plan: Plan) -> ReweighState:
        empty = moments.empty(plan.facts.d_model)
        return ReweighState(error=empty, data=empty)

    def enter(self, plan: Plan, state: TrainingState) -> None:
        """Nothing to prepare: `init` has allocated the moments."""

    @torch.no_grad()
    def step(self, plan: Plan, state: TrainingState) -> Reading:
        own: ReweighState = state.phase
        seen = look(state, state.stream.next(plan.recipe.budget.batch).x_BD)
        error = moments.add(own.error, seen.white_BD - seen.white_hat_BD)
        own = evolve(own, error=error, data=moments.add(own.data, seen.white_BD))
        count = float(error.n)
        if count >= self.samples:
            data_DD = moments.covariance(own.data)
            form_DD = self._form(moments.covariance(error), data_DD)
            form_DD *= state.metric.variance("white").double() / torch.sum(form_DD * data_DD)
            state.sae.weigh_by(form_DD)
            state.measured[f"{state.clock.phase}.condition"] = float(torch.linalg.cond(form_DD))
            own = evolve(own, finished=True)
        state.phase = own
        numbers = {"tokens": torch.tensor(count, device=state.device)}
        return Reading(step=state.clock.step, phase=state.clock.phase, values=numbers)

    def done(self, plan: Plan, state: TrainingState) -> bool:
        own: ReweighState = state.phase
        return own.finished

    def _form(self, error_DD: Tensor, data_DD: Tensor) -> Tensor:
        """(R + ridge tr(R) / D I)^-1 [D, D], float64."""
        # Of a dictionary that leaves nothing there is no shape to take: its ridge alone is left.
        mean = error_DD.diagonal().mean().clamp(min=1e-12 * data_DD.diagonal().mean())
        form_DD = torch.linalg.inv(error_DD + self.ridge * mean * torch.eye(len(error_DD)).to(error_DD))
        out: Tensor = (form_DD + form_DD.T) / 2
        return out
