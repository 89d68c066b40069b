"""Optimizers: the primal rule, its learning rate per parameter and its schedule.

Each parameter has a group of its own, so that rates can differ; the engine scales all of them by `scale(clock)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from attrs import evolve, field
from attrs.validators import deep_iterable, ge, gt, instance_of, le, lt
from torch import nn

from spalf.core.recipe import Derived, Plan
from spalf.core.slots import from_knob, optimizer
from spalf.core.values import Clock
from spalf.errors import Problem, RecipeError

FUSED_ON = ("cpu", "cuda")
LARGEST_STEP = 0.2


def warmup_steps(total: int) -> int:
    """total / 50 within 200 to 1000 steps, but never more than a fifth of a short run."""
    return max(1, min(max(200, min(1000, total // 50)), total // 5))


def schedule(clock: Clock, warmup: int, decay: float, final: float) -> float:
    """Linear from 0 over `warmup` steps, then 1, then linear to `final` over the last share `decay` of the budget.

    A later phase rises again, over `warmup` steps or 0.3 of what is left: a new constraint brings gradients that Adam's
    second moments have not seen, and its first steps would be several times the rate (measured: an end-to-end phase
    entered at full rate doubled the very KL that it was to lower).
    """
    length = warmup or warmup_steps(clock.total)
    if clock.entered:
        length = max(1, min(length, int(0.3 * (clock.total - clock.entered))))
    rise = min(1.0, (clock.step - clock.entered + 1) / length)
    left = 1.0 - clock.progress
    fall = 1.0 if left >= decay else final + (1.0 - final) * left / decay
    return rise * fall


def schedule_rows(plan: Plan, warmup: int, decay: float, final: float) -> list[Derived]:
    """What the schedule comes to in steps."""
    steps = warmup or warmup_steps(plan.total_steps)
    is_derived = steps == warmup_steps(plan.total_steps)
    return [
        Derived(
            path="optimizer.warmup",
            value=float(steps),
            formula="total_steps / 50 within 200 to 1000, at most total_steps / 5" if is_derived else "as given",
            origin="optimizer.warmup = 0" if is_derived else "optimizer.warmup",
        ),
        Derived(
            path="optimizer.decay_start",
            value=float(math.ceil((1.0 - decay) * plan.total_steps)),
            formula=f"(1 - decay) * total_steps; the rate ends at {final:g} of its peak",
            origin="optimizer.decay",
        ),
    ]


@optimizer("adam")
class Adam:
    """Adam (arXiv 1412.6980) with warm-up and a linear decay; multipliers for encoder, thresholds and gain.

    `warmup`: steps; 0 derives them. `decay`: share of the budget in which the rate falls to `final` times its peak. It
    does not fall to zero, because a last phase of a few percent of the budget still has to learn, and multipliers that
    lag behind a vanishing rate leave their constraints slack.
    """

    rule: ClassVar[str] = "adam"

    lr: float = from_knob("lr", validator=gt(0.0))
    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=deep_iterable([ge(0.0), lt(1.0)]))
    eps: float = field(default=1e-8, validator=gt(0.0))
    warmup: int = field(default=0, validator=ge(0))
    decay: float = field(default=0.2, validator=[ge(0.0), le(1.0)])
    final: float = field(default=0.1, validator=[ge(0.0), le(1.0)])
    encoder_scale: float = field(default=1.0, validator=gt(0.0))
    threshold_scale: float = field(default=1.0, validator=gt(0.0))
    gain_scale: float = field(default=1.0, validator=gt(0.0))
    fused: bool = field(default=True, validator=instance_of(bool))

    def build(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """One group per parameter, with its name. Fused where torch has that for the parameters' device."""
        groups = [{"params": [p], "lr": self._rate(name), "name": name} for name, p in named]
        fused = self.fused and all(g["params"][0].device.type in FUSED_ON for g in groups)  # type: ignore[index]
        return torch.optim.Adam(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)

    def _rate(self, name: str) -> float:
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("W_enc_FD", "b_enc_F"):
            return self.lr * self.encoder_scale
        if "threshold" in leaf:
            return self.lr * self.threshold_scale
        return self.lr * (self.gain_scale if leaf == "log_gain" else 1.0)

    def scale(self, clock: Clock) -> float:
        """Warm-up times decay, in (0, 1] while `final` > 0."""
        return schedule(clock, self.warmup, self.decay, self.final)

    def settle(self, plan: Plan) -> Adam:
        """With the warm-up filled in. Raises RecipeError where a step would move a unit row by more than a fifth."""
        step = self._relative_step(plan)
        if step > LARGEST_STEP:
            fits = self.lr * LARGEST_STEP / step
            problem = Problem(
                "lr",
                f"one step would move a unit row of {plan.facts.d_model} entries by {step:.2g} of its length, "
                f"above {LARGEST_STEP:g}",
                f"lower lr to {fits:.1g} or less, or encoder_scale",
            )
            raise RecipeError([problem])
        settled: Adam = evolve(cast(Any, self), warmup=self.warmup or warmup_steps(plan.total_steps))
        return settled

    def _relative_step(self, plan: Plan) -> float:
        # Adam moves each of the d entries of a unit row by about its rate: s_rel = lr sqrt(d).
        return self.lr * max(1.0, self.encoder_scale) * math.sqrt(plan.facts.d_model)

    def derive(self, plan: Plan) -> list[Derived]:
        """Rows for `spalf compile`."""
        step = Derived(
            path="optimizer.relative_step",
            value=self._relative_step(plan),
            formula=f"lr * max(1, encoder_scale) * sqrt(d_model), refused above {LARGEST_STEP:g}",
            origin="optimizer.lr",
        )
        return [*schedule_rows(plan, self.warmup, self.decay, self.final), step]


@optimizer("sgd")
class Sgd:
    """Stochastic gradient descent with heavy-ball momentum, v <- momentum v + g, on Adam's schedule."""

    rule: ClassVar[str] = ""

    lr: float = from_knob("lr", validator=gt(0.0))
    momentum: float = field(default=0.9, validator=[ge(0.0), lt(1.0)])
    warmup: int = field(default=0, validator=ge(0))
    decay: float = field(default=0.2, validator=[ge(0.0), le(1.0)])
    final: float = field(default=0.1, validator=[ge(0.0), le(1.0)])

    def build(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """One group per parameter, with its name."""
        groups = [{"params": [p], "lr": self.lr, "name": name} for name, p in named]
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)

    def scale(self, clock: Clock) -> float:
        """Warm-up times decay, in (0, 1] while `final` > 0."""
        return schedule(clock, self.warmup, self.decay, self.final)

    def settle(self, plan: Plan) -> Sgd:
        """With the warm-up filled in."""
        settled: Sgd = evolve(cast(Any, self), warmup=self.warmup or warmup_steps(plan.total_steps))
        return settled

    def derive(self, plan: Plan) -> list[Derived]:
        """Rows for `spalf compile`."""
        return schedule_rows(plan, self.warmup, self.decay, self.final)
