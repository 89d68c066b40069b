"""ADRC whose observer is robust far from the boundary, and fast where its errors keep their sign."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from attrs import evolve, field, frozen
from attrs.validators import and_, ge, gt, le, lt
from torch import Tensor

from spalf.core.recipe import Derived, Plan
from spalf.core.slots import dual
from spalf.core.values import Signal
from spalf.errors import ComponentError
from spalf.parts.dual.law import LIMIT, projected


@frozen(kw_only=True, eq=False)
class TrackingState:
    """Multipliers, and running means of v + margin and of its size: their ratio tells a bias from noise."""

    lam_M: Tensor
    bias_M: Tensor
    size_M: Tensor


@dual("adrc_tracking")
class AdrcTracking:
    """ADRC that estimates the multiplier and leaves the rest to the penalty; derived in docs/maths.md.

    lam <- [lam + K_P (v - v_previous) + K_I v~],  K_I = 2 rho w',  K_P = 2 rho w phi / (1 - phi): the law `adrc` with
    bandwidth k = 1 - phi, which asks of v no more than the augmented Lagrangian does by itself. phi = exp(-every /
    memory); observer w = 0.5 / (1 + (delay + lag) / every), lag = fast / (1 - fast), where `observer` is 0. Then
      v~ = v + margin, clipped to [-reach, reach]: a constraint far from its budget says that the primal is still on its
        way, not that lam is wrong by as much; without this, lam winds up while a dictionary forms;
      w' = min(1, w (1 + (boost - 1) T^4)), T = |mean of v + margin| / mean of |v + margin| over `span` ticks, in [0, 1]
        (the tracking signal of Trigg and Leach, 1967), 0 where |v + margin| > near: what keeps its sign close to the
        budget is lam* moving away, as in a falling learning rate, and not noise.
    `margin` moves the set point to v = -margin. `memory` and `delay` are in steps; `boost` = 1 leaves the tracking out.
    """

    capturable: ClassVar[bool] = True
    observer: float = field(default=0.0, validator=and_(ge(0.0), le(1.0)))
    memory: float = field(default=12.0, validator=gt(0.0))
    delay: float = field(default=30.0, validator=ge(0.0))
    reach: float = field(default=0.2, validator=gt(0.0))
    near: float = field(default=0.1, validator=gt(0.0))
    boost: float = field(default=8.0, validator=ge(1.0))
    span: float = field(default=20.0, validator=ge(1.0))
    margin: float = field(default=0.0, validator=and_(ge(0.0), lt(1.0)))
    every: int = field(default=0, validator=ge(0))
    limit: float = field(default=LIMIT, validator=gt(0.0))

    def settle(self, plan: Plan) -> AdrcTracking:
        filter: Any = plan.recipe.filter
        every = int(filter.every)
        if self.every not in (0, every):
            raise ValueError(f"every = {self.every}, but this law moves on the filter's ticks (set filter.every)")
        fast = float(getattr(filter, "fast", 0.0))
        observer = self.observer or 0.5 / (1.0 + (self.delay + fast / (1.0 - fast)) / every)
        settled: AdrcTracking = evolve(cast(Any, self), observer=observer, every=every)
        return settled

    def gains(self) -> tuple[float, float]:
        """(K_P, K_I) of the settled law over 2 rho, without boost."""
        phi = math.exp(-self.every / self.memory)
        return self.observer * phi / (1.0 - phi), self.observer

    def derive(self, plan: Plan) -> list[Derived]:
        mine = self.settle(plan)
        k_p, k_i = mine.gains()
        given = bool(self.observer) and mine.observer != evolve(cast(Any, self), observer=0.0).settle(plan).observer
        rule = "0.5 / (1 + (delay + lag) / every), lag = fast / (1 - fast)"
        return [
            Derived(path="dual.every", value=float(mine.every), formula="filter.every", origin="gain rule"),
            Derived(
                path="dual.observer",
                value=mine.observer,
                formula="given" if given else rule,
                origin="dual.observer" if given else "gain rule",
            ),
            Derived(path="dual.K_P", value=2 * k_p, formula="2 rho w phi / (1 - phi), at rho = 1", origin="gain rule"),
            Derived(path="dual.K_I", value=2 * k_i, formula="2 rho w, at rho = 1, without boost", origin="gain rule"),
        ]

    def init(self, m: int) -> TrackingState:
        """Raises ComponentError where an option is still 0."""
        if not (self.observer and self.every):
            raise ComponentError(
                'dual "adrc_tracking": options at 0 are derived from the filter (call settle(plan), or give them)'
            )
        # Sizes start at `near`: the first errors are no evidence of a bias.
        return TrackingState(lam_M=torch.zeros(m), bias_M=torch.zeros(m), size_M=torch.full((m,), self.near))

    def step(self, state: TrackingState, signal: Signal) -> TrackingState:
        k_p, k_i = self.gains()
        v_M = signal.fast_M + self.margin
        is_far_M = v_M.abs() > self.near
        bias_M = torch.where(is_far_M, 0.0, torch.lerp(state.bias_M, v_M, 1.0 / self.span))
        size_M = torch.where(is_far_M, v_M.abs(), torch.lerp(state.size_M, v_M.abs(), 1.0 / self.span))
        tracking_M = (bias_M.abs() / size_M.clamp(min=1e-12)).clamp(max=1.0)
        observer_M = (k_i * (1.0 + (self.boost - 1.0) * tracking_M**4)).clamp(max=1.0)
        push_M = k_p * (signal.fast_M - signal.previous_M) + observer_M * v_M.clamp(-self.reach, self.reach)
        return TrackingState(
            lam_M=projected(state.lam_M, state.lam_M + 2.0 * signal.rho_M * push_M, signal, self.limit),
            bias_M=torch.where(signal.on_M, bias_M, state.bias_M),
            size_M=torch.where(signal.on_M, size_M, state.size_M),
        )
