"""Laws whose gains are given: dual ascent, PI and nuPI. Gains are per tick."""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import and_, ge, gt, lt
from torch import Tensor

from spalf.core.slots import dual
from spalf.core.values import Signal
from spalf.parts.dual.law import LIMIT, LamState, projected


@dual("pi")
class Pi:
    """lam <- [lam + kp (v - v_previous) + ki v]; gains per tick.

    A proportional gain acts on the primal as a penalty does (arXiv 2509.22500): beside rho > 0 it counts twice.
    """

    capturable: ClassVar[bool] = True
    kp: float = field(default=0.5, validator=ge(0.0))
    ki: float = field(default=0.5, validator=gt(0.0))
    limit: float = field(default=LIMIT, validator=gt(0.0))

    def init(self, m: int) -> LamState:
        return LamState(lam_M=torch.zeros(m))

    def step(self, state: LamState, signal: Signal) -> LamState:
        push_M = self.kp * (signal.fast_M - signal.previous_M) + self.ki * signal.fast_M
        return LamState(lam_M=projected(state.lam_M, state.lam_M + push_M, signal, self.limit))


@frozen(kw_only=True, eq=False)
class NuPiState:
    """Multipliers, the smoothed violation s, and whether s has been started (boolean)."""

    lam_M: Tensor
    smooth_M: Tensor
    started_M: Tensor


@dual("nupi")
class NuPi:
    """nuPI (arXiv 2406.04558): s' = nu s + (1 - nu) v;  lam <- [lam + ki v + kp (s' - s)]; gains per tick.

    s starts at the violation at which its constraint entered. nu = 0 and kp = ki is optimistic ascent.
    """

    capturable: ClassVar[bool] = True
    nu: float = field(default=0.5, validator=and_(gt(-1.0), lt(1.0)))
    kp: float = field(default=0.5, validator=ge(0.0))
    ki: float = field(default=0.5, validator=gt(0.0))
    limit: float = field(default=LIMIT, validator=gt(0.0))

    def init(self, m: int) -> NuPiState:
        return NuPiState(lam_M=torch.zeros(m), smooth_M=torch.zeros(m), started_M=torch.zeros(m, dtype=torch.bool))

    def step(self, state: NuPiState, signal: Signal) -> NuPiState:
        before_M = torch.where(state.started_M, state.smooth_M, signal.previous_M)
        smooth_M = self.nu * before_M + (1 - self.nu) * signal.fast_M
        push_M = self.ki * signal.fast_M + self.kp * (smooth_M - before_M)
        return NuPiState(
            lam_M=projected(state.lam_M, state.lam_M + push_M, signal, self.limit),
            smooth_M=torch.where(signal.on_M, smooth_M, state.smooth_M),
            started_M=state.started_M | signal.on_M,
        )


@dual("ascent")
class Ascent:
    """lam <- [lam + rate v] per tick; with rate = 2 rho and a settled primal it is the method of multipliers."""

    capturable: ClassVar[bool] = True
    rate: float = field(default=1.0, validator=gt(0.0))
    limit: float = field(default=LIMIT, validator=gt(0.0))

    def init(self, m: int) -> LamState:
        return LamState(lam_M=torch.zeros(m))

    def step(self, state: LamState, signal: Signal) -> LamState:
        return LamState(lam_M=projected(state.lam_M, state.lam_M + self.rate * signal.fast_M, signal, self.limit))
