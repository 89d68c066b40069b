"""Filters: what controllers see of the noisy violations. M constraints."""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import evolve, field, frozen
from attrs.validators import and_, ge, gt, lt
from torch import Tensor

from spalf.core.slots import filter
from spalf.core.values import Signal


@frozen(kw_only=True, eq=False)
class EmaState:
    """Two running means of each violation, and the fast one as it was at the last tick."""

    fast_M: Tensor
    slow_M: Tensor
    previous_M: Tensor


@filter("dual_rate_ema")
class DualRateEma:
    """v <- beta v + (1 - beta) g at two rates, started at the first violation instead of 0, hence without bias.

    The default clock is one tick per slow memory, 1 / (1 - 0.99) = 100 steps: the multipliers then move slower than
    the primal answers, and the host is asked once in 100 steps.
    """

    capturable: ClassVar[bool] = True
    fast: float = field(default=0.9, validator=and_(ge(0.0), lt(1.0)))
    slow: float = field(default=0.99, validator=and_(ge(0.0), lt(1.0)))
    every: int = field(default=100, validator=gt(0))

    def init(self, m: int) -> EmaState:
        return EmaState(fast_M=torch.zeros(m), slow_M=torch.zeros(m), previous_M=torch.zeros(m))

    def enter(self, state: EmaState, g_M: Tensor, entering_M: Tensor) -> EmaState:
        """All three start at the first violation of the entering constraints."""
        return EmaState(
            fast_M=torch.where(entering_M, g_M, state.fast_M),
            slow_M=torch.where(entering_M, g_M, state.slow_M),
            previous_M=torch.where(entering_M, g_M, state.previous_M),
        )

    def step(self, state: EmaState, g_M: Tensor, on_M: Tensor) -> EmaState:
        # v + (1 - beta) (g - v), which returns a constant exactly; held still where off.
        return evolve(
            state,
            fast_M=torch.where(on_M, torch.lerp(state.fast_M, g_M, 1.0 - self.fast), state.fast_M),
            slow_M=torch.where(on_M, torch.lerp(state.slow_M, g_M, 1.0 - self.slow), state.slow_M),
        )

    def signal(self, state: EmaState, g_M: Tensor, on_M: Tensor) -> Signal:
        return Signal(g_M=g_M, fast_M=state.fast_M, slow_M=state.slow_M, previous_M=state.previous_M, on_M=on_M)

    def tick(self, state: EmaState) -> EmaState:
        return evolve(state, previous_M=state.fast_M)


@frozen(kw_only=True, eq=False)
class IdentityState:
    """Each violation as last seen, and as it was at the last tick."""

    fast_M: Tensor
    previous_M: Tensor


@filter("identity")
class Identity:
    """No filter: v = g. For exact violations, and as the control of an ablation."""

    capturable: ClassVar[bool] = True
    every: int = field(default=1, validator=gt(0))

    def init(self, m: int) -> IdentityState:
        return IdentityState(fast_M=torch.zeros(m), previous_M=torch.zeros(m))

    def enter(self, state: IdentityState, g_M: Tensor, entering_M: Tensor) -> IdentityState:
        return IdentityState(
            fast_M=torch.where(entering_M, g_M, state.fast_M),
            previous_M=torch.where(entering_M, g_M, state.previous_M),
        )

    def step(self, state: IdentityState, g_M: Tensor, on_M: Tensor) -> IdentityState:
        return evolve(state, fast_M=torch.where(on_M, g_M, state.fast_M))

    def signal(self, state: IdentityState, g_M: Tensor, on_M: Tensor) -> Signal:
        return Signal(g_M=g_M, fast_M=state.fast_M, slow_M=state.fast_M, previous_M=state.previous_M, on_M=on_M)

    def tick(self, state: IdentityState) -> IdentityState:
        return evolve(state, previous_M=state.fast_M)
