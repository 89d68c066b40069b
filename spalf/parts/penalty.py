"""Penalties: how rho_M moves. M constraints; stepped on the filter's ticks."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from attrs import evolve, field, frozen
from attrs.validators import and_, ge, gt, le, lt
from torch import Tensor

from spalf.core.recipe import Derived, Plan
from spalf.core.slots import penalty
from spalf.core.values import Signal


@frozen(kw_only=True, eq=False)
class ConstantState:
    rho_M: Tensor


@penalty("constant")
class Constant:
    """rho = `rho` for every constraint: right for dimensionless violations, whose scale is 1 by construction."""

    capturable: ClassVar[bool] = True
    rho: float = field(default=1.0, validator=gt(0.0))

    def init(self, m: int) -> ConstantState:
        return ConstantState(rho_M=torch.full((m,), self.rho))

    def enter(self, state: ConstantState, g_M: Tensor, entering_M: Tensor) -> ConstantState:
        return state

    def step(self, state: ConstantState, signal: Signal) -> ConstantState:
        return state


@frozen(kw_only=True, eq=False)
class CapuState:
    """Penalties, mean squares of the filtered violations, and ticks since entering (int64)."""

    rho_M: Tensor
    mean_square_M: Tensor
    ticks_M: Tensor


def _capu_init(m: int, start: float) -> CapuState:
    return CapuState(
        rho_M=torch.full((m,), start), mean_square_M=torch.ones(m), ticks_M=torch.zeros(m, dtype=torch.int64)
    )


def _capu_enter(state: CapuState, entering_M: Tensor, start: float) -> CapuState:
    """Mean square 1, the scale of a dimensionless violation, rather than one batch's noise."""
    return CapuState(
        rho_M=torch.where(entering_M, start, state.rho_M),
        mean_square_M=torch.where(entering_M, 1.0, state.mean_square_M),
        ticks_M=torch.where(entering_M, 0, state.ticks_M),
    )


@penalty("capu")
class Capu:
    """rho = scale / sqrt(mean square of v), unconditional and in both directions: not the method of arXiv 2508.15695.

    In [floor, cap] times `start`, and by at most a factor 2 every `every` ticks, because each change moves the
    effective multiplier [lam + 2 rho g]+ and the gain of the multipliers' law. `memory` is per tick; `every` = 0 is
    one slow memory of the filter.
    """

    capturable: ClassVar[bool] = True
    scale: float = field(default=1.0, validator=gt(0.0))
    memory: float = field(default=0.99, validator=and_(ge(0.0), lt(1.0)))
    start: float = field(default=1.0, validator=gt(0.0))
    floor: float = field(default=0.1, validator=and_(gt(0.0), le(1.0)))
    cap: float = field(default=10.0, validator=ge(1.0))
    every: int = field(default=0, validator=ge(0))
    eps: float = field(default=1e-8, validator=gt(0.0))

    def settle(self, plan: Plan) -> Capu:
        settled: Capu = evolve(cast(Any, self), every=self.every or _slow_ticks(plan))
        return settled

    def derive(self, plan: Plan) -> list[Derived]:
        bounds = f"[{self.floor:g}, {self.cap:g}] * start = [{self.floor * self.start:g}, {self.cap * self.start:g}]"
        return [
            Derived(
                path="penalty.every",
                value=float(self.settle(plan).every),
                formula="ceil(1 / ((1 - filter.slow) * filter.every)) ticks",
                origin="filter",
            ),
            Derived(path="penalty.rho", value=None, formula=f"scale / sqrt(mean square), in {bounds}", origin="run"),
        ]

    def init(self, m: int) -> CapuState:
        return _capu_init(m, self.start)

    def enter(self, state: CapuState, g_M: Tensor, entering_M: Tensor) -> CapuState:
        return _capu_enter(state, entering_M, self.start)

    def step(self, state: CapuState, signal: Signal) -> CapuState:
        # vbar <- zeta vbar + (1 - zeta) v^2
        mean_square_M = torch.lerp(state.mean_square_M, signal.fast_M.square(), 1.0 - self.memory)
        wanted_M = self.scale / (mean_square_M + self.eps).sqrt()
        near_M = wanted_M.clamp(state.rho_M / 2, state.rho_M * 2)
        bounded_M = near_M.clamp(self.floor * self.start, self.cap * self.start)
        ticks_M = state.ticks_M + 1
        rho_M = torch.where(ticks_M % max(1, self.every) == 0, bounded_M, state.rho_M)
        return CapuState(
            rho_M=torch.where(signal.on_M, rho_M, state.rho_M),
            mean_square_M=torch.where(signal.on_M, mean_square_M, state.mean_square_M),
            ticks_M=torch.where(signal.on_M, ticks_M, state.ticks_M),
        )


@penalty("capu_monotone")
class CapuMonotone:
    """CAPU as published (arXiv 2508.15695), for inequalities: C = [v]+, each constraint judged by its own C.

    vbar <- memory vbar + (1 - memory) C^2; where the violation has stalled, C > 0 and C >= stall * C of the last
    tick, rho <- max(rho, scale / sqrt(vbar + eps)). Never falls; at most `cap` times `start`, which the original,
    bounded by scale / sqrt(eps) alone, is not.
    """

    capturable: ClassVar[bool] = True
    scale: float = field(default=1.0, validator=gt(0.0))
    memory: float = field(default=0.99, validator=and_(ge(0.0), lt(1.0)))
    stall: float = field(default=0.999, validator=gt(0.0))
    start: float = field(default=1.0, validator=gt(0.0))
    cap: float = field(default=10.0, validator=ge(1.0))
    eps: float = field(default=1e-16, validator=gt(0.0))

    def init(self, m: int) -> CapuState:
        return _capu_init(m, self.start)

    def enter(self, state: CapuState, g_M: Tensor, entering_M: Tensor) -> CapuState:
        return _capu_enter(state, entering_M, self.start)

    def step(self, state: CapuState, signal: Signal) -> CapuState:
        c_M, before_M = signal.fast_M.clamp(min=0), signal.previous_M.clamp(min=0)
        mean_square_M = torch.lerp(state.mean_square_M, c_M.square(), 1.0 - self.memory)
        wanted_M = (self.scale / (mean_square_M + self.eps).sqrt()).clamp(max=self.cap * self.start)
        stalled_M = signal.on_M & (c_M > 0) & (c_M >= self.stall * before_M)
        return CapuState(
            rho_M=torch.where(stalled_M, torch.maximum(state.rho_M, wanted_M), state.rho_M),
            mean_square_M=torch.where(signal.on_M, mean_square_M, state.mean_square_M),
            ticks_M=state.ticks_M + signal.on_M,
        )


def _slow_ticks(plan: Plan) -> int:
    """Ticks in one slow memory of the plan's filter, at least 1; a filter without one has memory 1 step."""
    slow, every = float(getattr(plan.recipe.filter, "slow", 0.0)), plan.recipe.filter.every
    # 1 / (1 - 0.99) is 99.99999999999991: the small number keeps a ratio that is whole in decimals from rounding up.
    return max(1, math.ceil(1.0 / ((1.0 - slow) * every) - 1e-9))
