"""Terms that press on how many features are active, or on how much."""

from __future__ import annotations

from typing import ClassVar

from attrs import field
from attrs.validators import ge, gt, in_
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.slots import from_knob, term
from spalf.core.values import View
from spalf.parts.term.common import gate_pre, lengths, listed, needs_gate, ramp, reaches


@term("l0")
class L0:
    """weight times the mean number of active features per row, over the target.

    Its gradient is the activation's surrogate. The weight rises from 0 over the first `warmup` steps.
    """

    partial: ClassVar[bool] = True
    dense: ClassVar[bool] = False
    target: int = from_knob("L0_target", validator=gt(0))
    weight: float = field(default=1.0, validator=gt(0.0))
    warmup: int = field(default=0, validator=ge(0))

    @property
    def capturable(self) -> bool:
        return self.warmup == 0

    def settle(self, plan: Plan) -> L0:
        """Raises RecipeError where the run is shorter than the warm-up."""
        reaches(plan, self.warmup)
        return self

    def value(self, view: View) -> Tensor:
        weight = self.weight * ramp(view.clock, self.warmup)
        return weight * (view.forward.code.l0_B().mean() / self.target)


@term("l0_quadratic")
class L0Quadratic:
    """weight times (L0 / target - 1)^2, L0 the mean over the batch, or per row and then averaged where `each`.

    A penalty on both sides of a target. Its gradient vanishes at the target, so the weight is a stiffness and what
    pulls L0 away leaves a steady offset; the constraint `l0_rate` has none. `warmup` as of `l0`.
    """

    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    target: int = from_knob("L0_target", validator=gt(0))
    weight: float = field(default=1.0, validator=gt(0.0))
    warmup: int = field(default=0, validator=ge(0))
    each: bool = False

    def settle(self, plan: Plan) -> L0Quadratic:
        """Raises RecipeError where the run is shorter than the warm-up."""
        reaches(plan, self.warmup)
        return self

    def value(self, view: View) -> Tensor:
        ratio_B = view.sae.machine.mesh.sum(view.forward.code.l0_B()) / self.target
        ratio_B = ratio_B if self.each else ratio_B.mean()
        return self.weight * ramp(view.clock, self.warmup) * (ratio_B - 1).square().mean()


@term("l1")
class L1:
    """weight times the mean over rows of sum_j |gain| |z_j| ||w_j||, over the target.

    Every feature counts with the length of what it adds to the whitened reconstruction, so that neither small codes
    with long decoder rows nor a large gain make it cheap; `by_norm` false leaves the length out, which is right for
    unit rows alone. `of` "gate" sums ReLU(pi) of a gated activation instead of |z|. `warmup` as of `l0`; with a target
    of 1 the weight is the coefficient of the libraries.
    """

    partial: ClassVar[bool] = True
    dense: ClassVar[bool] = False
    target: int = from_knob("L0_target", validator=gt(0))
    weight: float = field(default=1.0, validator=gt(0.0))
    warmup: int = field(default=0, validator=ge(0))
    by_norm: bool = True
    of: str = field(default="code", validator=in_(("code", "gate")))

    def settle(self, plan: Plan) -> L1:
        """Raises RecipeError where the activation has no gate to sum, or the run ends within the warm-up."""
        reaches(plan, self.warmup)
        if self.of == "gate":
            needs_gate(plan, 'of = "gate"')
        return self

    def value(self, view: View) -> Tensor:
        """Raises RunError where the gate is asked for and the activation has none."""
        code = view.forward.code
        size_BK = gate_pre(view, "term.l1").relu() if self.of == "gate" else code.z_BK.abs()
        if self.by_norm:
            size_BK = size_BK * listed(lengths(view), code)
        return self.weight * ramp(view.clock, self.warmup) * (size_BK.sum(-1).mean() / self.target)
