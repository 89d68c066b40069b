"""Gates: when a phase may end. They count in tensors on the device; only `open`, asked on ticks, waits for it."""

from __future__ import annotations

import torch
from attrs import field, frozen
from attrs.validators import and_, ge, gt, le
from torch import Tensor

from spalf.core.slots import gate
from spalf.core.values import Clock, Signal


@frozen(kw_only=True, eq=False)
class FeasibleState:
    """Consecutive feasible steps (int64 scalar), and whether the gate has opened (boolean scalar)."""

    count: Tensor
    opened: Tensor


@gate("feasible")
class Feasible:
    """Being feasible permits the end of a phase; the clock decides.

    With L0 as objective the constraints are met long before L0 is low, so the first feasible step must not end the
    phase. The gate opens
      - at progress >= `latest`, whatever the violations;
      - from progress >= `earliest`, once all filtered violations were below 0 for `patience` consecutive steps,
        counted from the phase's first step.
    Progress is the share of the whole run's steps. The defaults leave its last 3 to 5 % to the phase that follows.
    In a short run that is too few steps for multipliers and thresholds to answer a new constraint (measured: 180 steps
    of 6,000 left faithfulness violated by 8 %), so both times come early enough to leave `leave` steps, or a tenth of
    the run where that is less.
    """

    patience: int = field(default=100, validator=gt(0))
    earliest: float = field(default=0.95, validator=and_(ge(0.0), le(1.0)))
    latest: float = field(default=0.97, validator=and_(ge(0.0), le(1.0)))
    leave: int = field(default=600, validator=ge(0))

    def __attrs_post_init__(self) -> None:
        if self.latest < self.earliest:
            raise ValueError(f"latest = {self.latest} comes before earliest = {self.earliest} (lower earliest)")

    def init(self) -> FeasibleState:
        return FeasibleState(count=torch.zeros((), dtype=torch.int64), opened=torch.zeros((), dtype=torch.bool))

    def step(self, state: FeasibleState, signal: Signal, clock: Clock) -> FeasibleState:
        is_feasible = ((signal.fast_M < 0) | ~signal.on_M).all()
        count = torch.where(is_feasible, state.count + 1, 0)
        permitted = clock.progress >= min(self.earliest, self._end(clock))
        opened = state.opened | (count >= self.patience) if permitted else state.opened
        return FeasibleState(count=count, opened=opened)

    def open(self, state: FeasibleState, clock: Clock) -> bool:
        return clock.progress >= self._end(clock) or bool(state.opened)

    def _end(self, clock: Clock) -> float:
        """Progress at which the gate opens whatever the violations."""
        return min(self.latest, 1.0 - min(self.leave / max(1, clock.total), 0.1))


@frozen(kw_only=True, eq=False)
class ExhaustedState:
    """Nothing to remember."""


@gate("exhausted")
class Exhausted:
    """Opens when the whole run's budget is spent."""

    def init(self) -> ExhaustedState:
        return ExhaustedState()

    def step(self, state: ExhaustedState, signal: Signal, clock: Clock) -> ExhaustedState:
        return state

    def open(self, state: ExhaustedState, clock: Clock) -> bool:
        return clock.exhausted
