"""`calibrate`: what is measured before any gradient is taken."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import evolve, field, frozen
from attrs.validators import gt

from spalf.core.recipe import Derived, Plan
from spalf.core.slots import phase
from spalf.core.state import TrainingState
from spalf.core.values import Reading
from spalf.engine import initialise, moments


@frozen(kw_only=True, eq=False)
class CalibrateState:
    """Moments so far, and whether they have been poured into metric and dictionary."""

    convergence: moments.Convergence
    finished: bool = False


@phase("calibrate")
class Calibrate:
    """Streaming mean and covariance until they settle; then whitener, anchors, rows, thresholds and gain.

    Takes no gradient and spends no training budget. Ends when the covariance changes by less than `tolerance`
    (relative Frobenius norm) between snapshots min(d^2, 1e6) activations apart, after at least 10 d activations, or at
    `samples`; which one ended it is recorded.
    """

    samples: int = field(default=200_000_000, validator=gt(0))
    tolerance: float = field(default=1e-3, validator=gt(0.0))

    def init(self, plan: Plan) -> CalibrateState:
        return CalibrateState(convergence=moments.init(plan.facts.d_model))

    def enter(self, plan: Plan, state: TrainingState) -> None:
        """Nothing to prepare: `init` has allocated the moments."""

    def step(self, plan: Plan, state: TrainingState) -> Reading:
        own: CalibrateState = state.phase
        x_BD = state.stream.next(plan.recipe.budget.batch).x_BD
        convergence = moments.update(own.convergence, x_BD)
        verdict = moments.verdict(convergence, moments.least_rows(plan.facts.d_model), self.samples, self.tolerance)
        state.phase = evolve(own, convergence=convergence)
        if verdict:
            self._finish(plan, state, verdict)
        device = state.device
        numbers = {
            "tokens": torch.as_tensor(float(convergence.moments.n), device=device),
            "change": torch.as_tensor(float(convergence.change), device=device),
        }
        return Reading(step=state.clock.step, phase=state.clock.phase, values=numbers)

    def done(self, plan: Plan, state: TrainingState) -> bool:
        own: CalibrateState = state.phase
        return own.finished

    def derive(self, plan: Plan) -> list[Derived]:
        """Rows for `spalf compile`."""
        return [
            Derived(
                path="calibrate.tokens",
                value=None,
                formula=f"until the covariance changes by < {self.tolerance:g}, at least 10 d_model, "
                f"at most {self.samples:,}",
                origin="phase.calibrate",
            )
        ]

    def _finish(self, plan: Plan, state: TrainingState, verdict: str) -> None:
        own: CalibrateState = state.phase
        m = own.convergence.moments
        plan.recipe.whitener.fit_(state.metric, m.mean_D, moments.covariance(m))
        sample = initialise.sample_size(initialise.start_density(plan))
        white_BD = state.metric.white(state.stream.next(sample).x_BD)
        initialise.initialise(plan, state, white_BD)
        report: Mapping[str, float] = getattr(state.metric, "report", dict)()
        state.measured.update({f"whitener.{k}": float(v) for k, v in report.items()})
        state.measured["calibrate.tokens"] = float(m.n)
        state.measured["calibrate.change"] = float(own.convergence.change)
        state.measured["calibrate.converged"] = float(verdict == "converged")
        state.measured["gain"] = float(state.sae.log_gain.detach().exp())
        state.phase = evolve(own, finished=True)
