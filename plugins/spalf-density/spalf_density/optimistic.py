"""Dual `optimistic`: gradient ascent that anticipates the next violation."""

from __future__ import annotations

import torch
from attrs import field, frozen
from attrs.validators import gt
from torch import Tensor

from spalf import Signal, dual


@frozen(kw_only=True, eq=False)
class OptimisticState:
    """The multipliers [M], in [0, limit]."""

    lam_M: Tensor


@dual("optimistic")
class Optimistic:
    """lambda' = [lambda + rate (2 v - v_previous)]+, at most `limit`.

    Optimistic gradient ascent: PI control with both gains equal to `rate` (arXiv 2406.04558, nu = 0). v is the fast
    filtered violation and v_previous its value one tick before. Where v answers at once and falls by s per unit of
    lambda, it settles for rate < 2 / (3 s), and fastest at 1 / (2 s); a primal that lags wants less.
    """

    rate: float = field(default=0.2, validator=gt(0.0))
    limit: float = field(default=1e3, validator=gt(0.0))

    def init(self, m: int) -> OptimisticState:
        return OptimisticState(lam_M=torch.zeros(m))

    def step(self, state: OptimisticState, signal: Signal) -> OptimisticState:
        push_M = self.rate * (2 * signal.fast_M - signal.previous_M)
        return OptimisticState(lam_M=(state.lam_M + push_M).clamp(0.0, self.limit))
