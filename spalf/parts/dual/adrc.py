"""First-order ADRC: gains from a model of the plant; and the published recursion, which diverges."""

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

RESPONSE = 200.0
"""Steps in which faithfulness answers its multiplier in training: hundreds, where the drift of L0 takes thousands."""


@frozen(kw_only=True, eq=False)
class AdrcState:
    """Multipliers, and the observer's estimate of the lumped disturbance f, for diagnosis only."""

    lam_M: Tensor
    disturbance_M: Tensor


@dual("adrc")
class Adrc:
    """First-order ADRC with plant memory, in velocity form; derived in docs/maths.md after arXiv 2601.18142.

    lam <- [lam + K_P (v - v_previous) + K_I v], K_I = w k / b0, K_P = (phi - (1 - w)(1 - k)) / b0, with observer
    w, bandwidth k, plant memory phi = exp(-every / memory) over one tick, and b0 = gain (1 - phi) / (2 rho) for each
    constraint. At gain 1, b0 is a safe upper bound of the true input gain, jointly for coupled constraints.
    `memory` and `delay` (dead time) are in steps. Options at 0 are settled from the filter by the gain rule:
      every = filter.every;  memory = max(200, every);  k = max(w, 1 - phi);
      w = 0.5 / (1 + (delay + lag) / every), lag = fast / (1 - fast).
    The default dead time makes K_I per step nearly independent of the clock; 0 is for a primal that answers at once.
    `margin` moves the set point to v = -margin: a law that holds v at 0 ends on the wrong side half of the time.
    """

    capturable: ClassVar[bool] = True
    observer: float = field(default=0.0, validator=and_(ge(0.0), le(1.0)))
    bandwidth: float = field(default=0.0, validator=and_(ge(0.0), le(1.0)))
    gain: float = field(default=1.0, validator=gt(0.0))
    memory: float = field(default=0.0, validator=ge(0.0))
    delay: float = field(default=100.0, validator=ge(0.0))
    every: int = field(default=0, validator=ge(0))
    limit: float = field(default=LIMIT, validator=gt(0.0))
    margin: float = field(default=0.0, validator=and_(ge(0.0), lt(1.0)))

    def settle(self, plan: Plan) -> Adrc:
        filter: Any = plan.recipe.filter
        every = int(filter.every)
        if self.every not in (0, every):
            raise ValueError(f"every = {self.every}, but this law moves on the filter's ticks (set filter.every)")
        fast = float(getattr(filter, "fast", 0.0))
        lag = fast / (1.0 - fast)
        memory = self.memory or max(RESPONSE, float(every))
        observer = self.observer or 0.5 / (1.0 + (self.delay + lag) / every)
        bandwidth = self.bandwidth or max(observer, 1.0 - math.exp(-every / memory))
        return self._with(observer=observer, bandwidth=bandwidth, memory=memory, every=every)

    def _with(self, **options: Any) -> Adrc:
        made: Adrc = evolve(cast(Any, self), **options)
        return made

    @property
    def phi(self) -> float:
        """Plant memory over one tick."""
        return math.exp(-self.every / self.memory)

    def gains(self) -> tuple[float, float]:
        """(b0 K_P, b0 K_I) of the settled law: both free of the penalty."""
        w, k = self.observer, self.bandwidth
        return self.phi - (1.0 - w) * (1.0 - k), w * k

    def derive(self, plan: Plan) -> list[Derived]:
        mine, rule = self.settle(plan), self._with(observer=0.0, bandwidth=0.0).settle(plan)
        formulas = {
            "every": "filter.every",
            "memory": f"max({RESPONSE:g}, every) steps, or as given",
            "observer": "0.5 / (1 + (delay + lag) / every), lag = fast / (1 - fast)",
            "bandwidth": "max(observer, 1 - exp(-every / memory))",
        }
        rows = [
            Derived(
                path=f"dual.{name}",
                value=float(getattr(mine, name)),
                formula=formula if getattr(mine, name) == getattr(rule, name) else "given",
                origin="gain rule" if getattr(mine, name) == getattr(rule, name) else f"dual.{name}",
            )
            for name, formula in formulas.items()
        ]
        b0 = mine.gain * (1.0 - mine.phi) / 2.0
        k_p, k_i = mine.gains()
        return [
            *rows,
            Derived(path="dual.phi", value=mine.phi, formula="exp(-every / memory)", origin="gain rule"),
            Derived(path="dual.b0", value=b0, formula="gain (1 - phi) / (2 rho), at rho = 1", origin="gain rule"),
            Derived(path="dual.K_P", value=k_p / b0, formula="(phi - (1 - w)(1 - k)) / b0, at rho = 1", origin="adrc"),
            Derived(path="dual.K_I", value=k_i / b0, formula="w k / b0, at rho = 1", origin="adrc"),
        ]

    def init(self, m: int) -> AdrcState:
        """Raises ComponentError where an option is still 0."""
        if not all((self.observer, self.bandwidth, self.memory, self.every)):
            raise ComponentError(
                'dual "adrc": options at 0 are derived from the filter (call settle(plan), or give them)'
            )
        return AdrcState(lam_M=torch.zeros(m), disturbance_M=torch.zeros(m))

    def step(self, state: AdrcState, signal: Signal) -> AdrcState:
        v_M = signal.fast_M
        k_p, k_i = self.gains()
        b0_M = self.gain * (1.0 - self.phi) / (2.0 * signal.rho_M)
        push_M = (k_p * (v_M - signal.previous_M) + k_i * (v_M + self.margin)) / b0_M
        lam_M = projected(state.lam_M, state.lam_M + push_M, signal, self.limit)
        # The observer's state after the projection: f = b0 lam - (phi - 1 + k) v.
        f_M = b0_M * lam_M - (self.phi - 1.0 + self.bandwidth) * v_M
        return AdrcState(lam_M=lam_M, disturbance_M=torch.where(signal.on_M, f_M, state.disturbance_M))


@frozen(kw_only=True, eq=False)
class ObserverState:
    """Multipliers and the observer's xi."""

    lam_M: Tensor
    xi_M: Tensor


@dual("adrc_literal")
class AdrcLiteral:
    """The recursion of arXiv 2601.18142 as published, kept as a negative control: it diverges for every observer w > 0.

    f = xi + w v;  lam <- [lam + 2w (v - v_previous) + w^2 v_previous - f];  xi <- (1 - w) xi - w^2 v - w lam.
    Only the clip at `limit` keeps its numbers finite.
    """

    capturable: ClassVar[bool] = True
    known_to_diverge: ClassVar[bool] = True

    observer: float = field(default=0.3, validator=and_(gt(0.0), le(1.0)))
    limit: float = field(default=1e4, validator=gt(0.0))

    def init(self, m: int) -> ObserverState:
        return ObserverState(lam_M=torch.zeros(m), xi_M=torch.zeros(m))

    def step(self, state: ObserverState, signal: Signal) -> ObserverState:
        w, v_M, before_M = self.observer, signal.fast_M, signal.previous_M
        f_M = state.xi_M + w * v_M
        wanted_M = state.lam_M + 2 * w * (v_M - before_M) + w**2 * before_M - f_M
        xi_M = (1 - w) * state.xi_M - w**2 * v_M - w * state.lam_M
        return ObserverState(
            lam_M=projected(state.lam_M, wanted_M, signal, self.limit),
            xi_M=torch.where(signal.on_M, xi_M, state.xi_M),
        )
