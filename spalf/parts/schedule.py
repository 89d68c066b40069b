"""Schedules: the learning rate's course, as a factor on every rate of an optimizer.

Each is a rise times a fall. The rise is linear from 0 over `warmup` steps, and begins anew in a later phase, over
`warmup` steps or 0.3 of what is left: a new constraint brings gradients that an optimizer's moments have not seen, and
its first steps would be several times the rate (measured: an end-to-end phase entered at full rate doubled the very KL
that it was to lower). The fall goes by the whole run's steps.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

from attrs import evolve, field
from attrs.validators import ge, le

from spalf.core.recipe import Derived, Plan
from spalf.core.slots import schedule
from spalf.core.values import Clock

S = TypeVar("S", bound="Linear | Cosine | InverseSqrt")


def warmup_steps(total: int) -> int:
    """total / 50 within 200 to 1000 steps, but never more than a fifth of a short run."""
    return max(1, min(max(200, min(1000, total // 50)), total // 5))


def rise(clock: Clock, warmup: int) -> float:
    """Linear from 0 to 1 over `warmup` steps (0: as derived) of the phase, in (0, 1]."""
    length = warmup or warmup_steps(clock.total)
    if clock.entered:
        length = max(1, min(length, int(0.3 * (clock.total - clock.entered))))
    return min(1.0, (clock.step - clock.entered + 1) / length)


def _settled(own: S, plan: Plan) -> S:
    return cast(S, evolve(cast(Any, own), warmup=own.warmup or warmup_steps(plan.total_steps)))


def _warmup_row(plan: Plan, warmup: int) -> Derived:
    steps = warmup or warmup_steps(plan.total_steps)
    is_derived = steps == warmup_steps(plan.total_steps)
    return Derived(
        path="warmup",
        value=float(steps),
        formula="total_steps / 50 within 200 to 1000, at most total_steps / 5" if is_derived else "as given",
        origin="schedule.warmup = 0" if is_derived else "schedule.warmup",
    )


@schedule("linear")
class Linear:
    """Warm-up, plateau, and a linear decay to `final` over the last share `decay` of the budget.

    It does not fall to zero by default, because a last phase of a few percent of the budget still has to learn, and
    multipliers that lag behind a vanishing rate leave their constraints slack.
    """

    warmup: int = field(default=0, validator=ge(0))
    """Steps; 0 derives them, 1 is none."""
    decay: float = field(default=0.2, validator=[ge(0.0), le(1.0)])
    """Share of the budget in which the rate falls."""
    final: float = field(default=0.1, validator=[ge(0.0), le(1.0)])
    """Where it ends, as a share of its peak."""

    def scale(self, clock: Clock) -> float:
        """Rise times 1, then times final + (1 - final) left / decay."""
        left = 1.0 - clock.progress
        fall = 1.0 if left >= self.decay else self.final + (1.0 - self.final) * left / self.decay
        return rise(clock, self.warmup) * fall

    def settle(self, plan: Plan) -> Linear:
        """With the warm-up filled in."""
        return _settled(self, plan)

    def derive(self, plan: Plan) -> list[Derived]:
        """Rows for `spalf compile`."""
        start = Derived(
            path="decay_start",
            value=float(math.ceil((1.0 - self.decay) * plan.total_steps)),
            formula=f"(1 - decay) * total_steps; the rate ends at {self.final:g} of its peak",
            origin="schedule.decay",
        )
        return [_warmup_row(plan, self.warmup), start]


@schedule("cosine")
class Cosine:
    """Warm-up, then half a cosine from the peak to `final` over the rest of the budget (1608.03983, one cycle)."""

    warmup: int = field(default=0, validator=ge(0))
    """Steps; 0 derives them, 1 is none."""
    final: float = field(default=0.1, validator=[ge(0.0), le(1.0)])
    """Where it ends, as a share of its peak."""

    def scale(self, clock: Clock) -> float:
        """Rise times final + (1 - final) (1 + cos(pi u)) / 2, u the share done of what follows the first warm-up."""
        warmup = min(self.warmup or warmup_steps(clock.total), clock.total)
        done = min(1.0, max(0, clock.step - warmup) / max(1, clock.total - warmup))
        fall = self.final + (1.0 - self.final) * (1.0 + math.cos(math.pi * done)) / 2.0
        return rise(clock, self.warmup) * fall

    def settle(self, plan: Plan) -> Cosine:
        """With the warm-up filled in."""
        return _settled(self, plan)

    def derive(self, plan: Plan) -> list[Derived]:
        """Rows for `spalf compile`."""
        return [_warmup_row(plan, self.warmup)]


@schedule("constant")
class Constant:
    """One rate throughout; a warm-up only where it is asked for."""

    warmup: int = field(default=1, validator=ge(1))
    """Steps; 1 is none."""

    def scale(self, clock: Clock) -> float:
        """The rise alone."""
        return rise(clock, self.warmup)


@schedule("inverse_sqrt")
class InverseSqrt:
    """Warm-up, then the inverse square root of the step (1706.03762): no end is aimed at, so a run may be prolonged."""

    warmup: int = field(default=0, validator=ge(0))
    """Steps to the peak, behind which the rate is sqrt(warmup / step); 0 derives them."""

    def scale(self, clock: Clock) -> float:
        """Rise times min(1, sqrt(warmup / step)), steps counted from 1."""
        warmup = self.warmup or warmup_steps(clock.total)
        return rise(clock, self.warmup) * min(1.0, math.sqrt(warmup / (clock.step + 1)))

    def settle(self, plan: Plan) -> InverseSqrt:
        """With the warm-up filled in."""
        return _settled(self, plan)

    def derive(self, plan: Plan) -> list[Derived]:
        """Rows for `spalf compile`."""
        return [_warmup_row(plan, self.warmup)]
