"""Dual `cooper`: multipliers by Cooper's nuPI controller.

Shapes: M constraints.
"""

from __future__ import annotations

import torch
from attrs import field, frozen
from attrs.validators import and_, ge, gt, lt
from cooper.multipliers.multipliers import DenseMultiplier
from cooper.optim.torch_optimizers.extragradient import ExtraSGD
from cooper.optim.torch_optimizers.nupi_optimizer import nuPI, nuPIInitType
from cooper.utils.annotations import ConstraintType
from torch import Tensor

from spalf import Signal, dual


@frozen(kw_only=True, eq=False)
class CooperState:
    """Multipliers in [0, limit], nuPI's smoothed violation, and whether that has been started (boolean), each [M]."""

    lam_M: Tensor
    smooth_M: Tensor
    started_M: Tensor


def weight_of(multiplier: DenseMultiplier) -> torch.nn.Parameter:
    """The parameter that holds the multipliers' values [M]."""
    assert isinstance(multiplier.weight, torch.nn.Parameter)
    return multiplier.weight


@dual("cooper")
class Cooper:
    """nuPI (arXiv 2406.04558) by Cooper (arXiv 2504.01212): lam <- [lam + rate (v + kp (1 - nu) (v - s))]+.

    s is the smoothed violation, s <- nu s + (1 - nu) v, which starts at the first violation that it sees; kp = 0 is
    projected gradient ascent. Violations are dimensionless, so one `rate` fits constraints of any unit. A rule that
    divides by a gradient's own size, such as Adam, would move a multiplier by `rate` whatever the violation is.

    It aims at v = -`margin`: a little above 0, and a run ends inside its budgets and not on either side of them.

    In a `constrained` phase it moves on the filter's ticks and sees the filtered violations. In a phase `cooper` it
    moves at every step and sees the batch's own.
    """

    rate: float = field(default=0.2, validator=gt(0.0))
    kp: float = field(default=0.0, validator=ge(0.0))
    nu: float = field(default=0.0, validator=and_(ge(0.0), lt(1.0)))
    margin: float = field(default=0.0, validator=ge(0.0))
    limit: float = field(default=1e3, validator=gt(0.0))

    def init(self, m: int) -> CooperState:
        return CooperState(lam_M=torch.zeros(m), smooth_M=torch.zeros(m), started_M=torch.zeros(m, dtype=torch.bool))

    def step(self, state: CooperState, signal: Signal) -> CooperState:
        multiplier = self.multiplier(state.lam_M)
        weight, error_M = weight_of(multiplier), self.error(signal.fast_M)
        optimizer = self.controller(state, weight, error_M)
        weight.grad = error_M
        optimizer.step()
        multiplier.post_step_()
        return self.closed(state, multiplier, optimizer, signal.on_M)

    def error(self, g_M: Tensor) -> Tensor:
        """What the multipliers integrate: the violation without its graph, from the margin on."""
        return g_M.detach() + self.margin

    def multiplier(self, lam_M: Tensor) -> DenseMultiplier:
        """Cooper's multipliers of inequality constraints, started at `lam_M`."""
        multiplier = DenseMultiplier(init=lam_M.clone())
        multiplier.set_constraint_type(ConstraintType.INEQUALITY)
        return multiplier

    def controller(self, state: CooperState, weight: torch.nn.Parameter, first_M: Tensor) -> nuPI:
        """Cooper's nuPI over `weight`, with the smoothed violation of `state`."""
        gains = {name: torch.tensor(value, device=weight.device) for name, value in (("Kp", self.kp), ("Ki", 1.0))}
        optimizer = nuPI(
            [weight],
            lr=self.rate,
            ema_nu=self.nu,
            init_type=nuPIInitType.ZEROS,
            maximize=True,
            Kp=gains["Kp"],
            Ki=gains["Ki"],
        )
        optimizer.state[weight]["xi"] = torch.where(state.started_M, state.smooth_M, first_M)
        return optimizer

    def ascent(self, weight: torch.nn.Parameter) -> ExtraSGD:
        """Cooper's gradient ascent over `weight` that can take a half step."""
        return ExtraSGD([weight], lr=self.rate, maximize=True)

    def closed(
        self, state: CooperState, multiplier: DenseMultiplier, optimizer: torch.optim.Optimizer, on_M: Tensor
    ) -> CooperState:
        """The state after Cooper has moved: multipliers of constraints that are off stay as they were."""
        lam_M = multiplier.weight.detach().clamp(max=self.limit)
        smooth_M = optimizer.state[multiplier.weight].get("xi", state.smooth_M)
        return CooperState(
            lam_M=torch.where(on_M, lam_M, state.lam_M),
            smooth_M=torch.where(on_M, smooth_M, state.smooth_M),
            started_M=state.started_M | on_M,
        )
