"""`constrained`: every stretch of training by gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import evolve, field
from attrs.validators import gt

from spalf.core.protocols import Gate
from spalf.core.recipe import Plan
from spalf.core.slots import phase
from spalf.core.state import TrainingState
from spalf.core.values import Reading
from spalf.engine import control
from spalf.engine.step import primal_dual_step, switch_on


@phase("constrained")
class Constrained:
    """Minimise the sum of `terms` subject to `constraints` until `gate` opens or the budget is spent.

    `hold` names what stays frozen of "dual" and "penalty". `handover` maps a constraint that ends to one that takes
    over its multiplier and penalty. Constraints that are already on keep their budgets and multipliers; entering ones
    measure a budget on one batch. `rate` scales the optimizer's schedule: a constraint measured on a few sequences has
    gradients of much noise, which Adam at full rate turns into error.
    """

    terms: tuple[str, ...] = ("l0",)
    constraints: tuple[str, ...] = ()
    gate: Gate[Any]
    hold: tuple[str, ...] = ()
    handover: Mapping[str, str] = field(factory=dict)
    rate: float = field(default=1.0, validator=gt(0.0))

    def init(self, plan: Plan) -> Any:
        return self.gate.init()

    def enter(self, plan: Plan, state: TrainingState) -> None:
        names = plan.constraints
        device = state.device
        on_M = torch.tensor([n in self.constraints for n in names], dtype=torch.bool, device=device)
        entering_M = on_M & ~state.control.on_M
        state.control = evolve(state.control, on_M=on_M)
        if bool(entering_M.any()):
            switch_on(plan, state, [n for i, n in enumerate(names) if bool(entering_M[i])])
        if self.handover:
            # After entering, which would calibrate an inherited penalty anew.
            pairs = [(names.index(a), names.index(b)) for a, b in self.handover.items()]
            state.control = control.hand_over(state.control, pairs)

    def step(self, plan: Plan, state: TrainingState) -> Reading:
        reading, signal = primal_dual_step(plan, state, self.terms, self.constraints, self.hold, self.rate)
        state.phase = self.gate.step(state.phase, signal, state.clock)
        return reading

    def done(self, plan: Plan, state: TrainingState) -> bool:
        return state.clock.exhausted or self.gate.open(state.phase, state.clock)
