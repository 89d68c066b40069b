"""The options that all optimizers share: a rate, its course, multipliers by parameter, and a bound on the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar, dataclass_transform

import attrs
from attrs import field
from attrs.validators import ge, gt
from torch import nn

from spalf.core.protocols import Schedule
from spalf.core.recipe import Derived, Plan
from spalf.core.slots import from_knob, from_slot
from spalf.core.values import Clock
from spalf.errors import Problem, RecipeError

FUSED_ON = ("cpu", "cuda")
LARGEST_STEP = 0.2

C = TypeVar("C")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def options(cls: type[C]) -> type[C]:
    """Frozen, keyword-only options that components inherit; carries no label."""
    return attrs.frozen(kw_only=True)(cls)


@options
class Rates:
    """A learning rate per parameter; a multiplier of 0 freezes its parameters where they are."""

    lr: float = from_knob("lr", validator=gt(0.0))
    """Peak of the learning rate."""
    schedule: Schedule = from_slot("linear")
    """Its course over the run."""
    encoder_scale: float = field(default=1.0, validator=ge(0.0))
    """Factor on the rate of the encoder's rows and bias."""
    threshold_scale: float = field(default=1.0, validator=ge(0.0))
    """Factor on the rate of thresholds."""
    gain_scale: float = field(default=1.0, validator=ge(0.0))
    """Factor on the rate of the gain; 0 keeps the one that calibration found."""
    max_norm: float = field(default=0.0, validator=ge(0.0))
    """Scale the gradient of all parameters down to this norm where it is longer; 0: as it is."""

    def groups(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """One group per parameter, with its name."""
        return [{"params": [p], "lr": self._rate(name), "name": name} for name, p in named]

    def scale(self, clock: Clock) -> float:
        """The schedule's."""
        return self.schedule.scale(clock)

    def _rate(self, name: str) -> float:
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("W_enc_FD", "b_enc_F"):
            return self.lr * self.encoder_scale
        if "threshold" in leaf:
            return self.lr * self.threshold_scale
        return self.lr * (self.gain_scale if leaf == "log_gain" else 1.0)


@options
class Bounded(Rates):
    """An optimizer whose step has the size of the rate whatever the gradient's, so that a step can be foreseen."""

    size: ClassVar[float] = 1.0
    """Root mean square of a step's entries at a rate of 1."""

    def settle(self, plan: Plan) -> Any:
        """Raises RecipeError where a step would move a unit row by more than a fifth."""
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
        return self

    def derive(self, plan: Plan) -> list[Derived]:
        """Rows for `spalf compile`."""
        times = "" if self.size == 1.0 else f"{self.size:g} * "
        return [
            Derived(
                path="optimizer.relative_step",
                value=self._relative_step(plan),
                formula=f"{times}lr * max(1, encoder_scale) * sqrt(d_model), refused above {LARGEST_STEP:g}",
                origin="optimizer.lr",
            )
        ]

    def _relative_step(self, plan: Plan) -> float:
        # Each of the d entries of a unit row moves by about the rate: s_rel = lr sqrt(d).
        return self.size * self.lr * max(1.0, self.encoder_scale) * math.sqrt(plan.facts.d_model)
