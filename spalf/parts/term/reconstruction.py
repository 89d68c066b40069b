"""Errors of the reconstruction: where they are the objective, sparsity is a constraint or the activation's own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
from attrs import Attribute, evolve, field
from attrs.validators import deep_iterable, gt, in_
from torch import Tensor

from spalf.core.recipe import Derived, Plan
from spalf.core.slots import label, term
from spalf.core.values import View, White
from spalf.errors import Problem, RecipeError
from spalf.kernels.squares import quadratic_form
from spalf.parts.term.common import decoded, gate_pre, mean_square, needs_gate


@term("mse")
class Mse:
    """weight times the mean over rows of ||y - y_hat||^2 in whitened coordinates: a sum over dimensions.

    `reduce` "mean" divides by d, as libraries that average over dimensions do.
    """

    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    capturable: ClassVar[bool] = True
    weight: float = field(default=1.0, validator=gt(0.0))
    reduce: str = field(default="sum", validator=in_(("sum", "mean")))

    def value(self, view: View) -> Tensor:
        error_BD = view.forward.white_hat_BD - view.forward.white_BD  # no change of sign in its gradient
        return self.weight / (error_BD.shape[1] if self.reduce == "mean" else 1) * mean_square(error_BD)


@term("relative_mse")
class RelativeMse:
    """weight times the unexplained share of variance, mean_b ||x - x_hat||^2 over a total variance, both in `space`.

    "residual" is what a phase `reweigh` has measured: whitened errors weighed by the inverse of their covariance then.
    `over` "data" divides by the calibrated variance (tr S in "raw"), a constant; "batch" by that of the batch itself.
    """

    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    capturable: ClassVar[bool] = True
    weight: float = field(default=1.0, validator=gt(0.0))
    space: str = field(default="raw", validator=in_(("raw", "white", "residual")))
    over: str = field(default="data", validator=in_(("data", "batch")))

    def settle(self, plan: Plan) -> RelativeMse:
        """Raises RecipeError where errors are to be weighed by what no phase has measured by then."""
        if self.space != "residual":
            return self
        own = {name for name, one in plan.recipe.term.items() if one == self}
        for name in plan.recipe.phases:
            one = plan.recipe.phase[name]
            if label(type(one)).use == "reweigh":
                return self
            if own.intersection(getattr(one, "terms", ())):
                break
        message = 'is "residual", and no phase measures that before it is used'
        hint = 'put a phase with use = "reweigh" into `phases` before this term\'s, or use "raw" or "white"'
        raise RecipeError([Problem("space", message, hint)])

    def value(self, view: View) -> Tensor:
        forward = view.forward
        error = self._mean_square(view, White(forward.white_hat_BD - forward.white_BD))
        if self.over == "data":
            # The form of the errors is scaled to the data's variance in whitened coordinates.
            total = view.metric.variance("raw" if self.space == "raw" else "white").detach()
        else:
            total = self._mean_square(view, White(forward.white_BD - forward.white_BD.mean(0)))
        return self.weight * error / total.clamp(min=torch.finfo(total.dtype).tiny)

    def _mean_square(self, view: View, v_BD: White) -> Tensor:
        if self.space == "residual":
            return quadratic_form(v_BD, view.sae.form_DD) / v_BD.shape[0]
        return view.metric.raw_square(v_BD) / v_BD.shape[0] if self.space == "raw" else mean_square(v_BD)


def _rising(instance: Any, attribute: Attribute[Any], value: tuple[float, ...]) -> None:
    if not value or value[0] <= 0 or value[-1] != 1 or any(b <= a for a, b in pairwise(value)):
        raise ValueError(f"{attribute.name} must rise from above 0 to 1, such as [0.25, 0.5, 1.0]; got {list(value)}")


@term("nested")
class Nested:
    """sum_g w_g mean_b ||y - y_hat_g||^2, y_hat_g decoded from the first m_g features alone (arXiv 2503.17547).

    It makes the first features a dictionary of their own. `sizes`: m_g as rising shares of F, the last one 1.
    `weights`: w_g, none for all 1; `average` divides the sum by the number of sizes. Libraries differ by that: 1 each,
    1 / G each, and 1 / G^2 where a mean of weighted losses is taken, next to which an auxiliary term weighs G times
    more. `reduce` as of `mse`.
    """

    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    sizes: tuple[float, ...] = field(default=(0.0625, 0.125, 0.25, 0.5, 1.0), validator=_rising)
    weights: tuple[float, ...] = field(default=(), validator=deep_iterable(gt(0.0)))
    average: bool = False
    reduce: str = field(default="sum", validator=in_(("sum", "mean")))

    def settle(self, plan: Plan) -> Nested:
        """Raises RecipeError where weights and sizes differ in number, or two sizes come to the same features."""
        if self.weights and len(self.weights) != len(self.sizes):
            message = f"has {len(self.weights)} numbers, sizes has {len(self.sizes)}"
            raise RecipeError([Problem("weights", message, "give one weight per size, or none")])
        ends = self._ends(plan.knobs.F)
        if ends[0] < 1 or len(set(ends)) < len(ends):
            message = f"come to {', '.join(map(str, ends))} of {plan.knobs.F} features"
            raise RecipeError([Problem("sizes", message, "each has to add at least one: raise F, or drop a size")])
        return self

    def derive(self, plan: Plan) -> list[Derived]:
        """One row per size for `spalf compile`."""
        return [
            Derived(path=f"features.{i}", value=end, formula=f"{share:g} * F", origin="sizes")
            for i, (share, end) in enumerate(zip(self.sizes, self._ends(plan.knobs.F), strict=True))
        ]

    def value(self, view: View) -> Tensor:
        sae, code, white_BD = view.sae, view.forward.code, view.forward.white_BD
        ends = self._ends(code.width)
        weights = self.weights or (1.0,) * len(ends)
        total = weights[-1] * mean_square(view.forward.white_hat_BD - white_BD)
        prefix_BD: Tensor = sae.b_dec_D
        z_BF = code.dense()
        for begin, end, weight in zip((0, *ends), ends[:-1], weights, strict=False):
            prefix_BD = prefix_BD + decoded(view, z_BF[:, begin:end], slice(begin, end))
            total = total + weight * mean_square(prefix_BD - white_BD)
        return total / (len(ends) if self.average else 1) / (white_BD.shape[1] if self.reduce == "mean" else 1)

    def _ends(self, width: int) -> tuple[int, ...]:
        return tuple(int(share * width) for share in self.sizes)


@term("gated_aux")
class GatedAux:
    """weight times mean_b ||y - (gain ReLU(pi) W_dec + b_dec)||^2, the decoder held still (arXiv 2404.16014).

    It is what trains the gate: the reconstruction from its own pre-activation. Decoder, gain and b_dec take no gradient
    here, or the term would bend the dictionary to a reconstruction that is never used; `frozen` false repeats that
    fault of a public trainer.
    """

    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    weight: float = field(default=1.0, validator=gt(0.0))
    frozen: bool = True

    def settle(self, plan: Plan) -> GatedAux:
        """Raises RecipeError where the activation has no gate."""
        needs_gate(plan, "it")
        return self

    def value(self, view: View) -> Tensor:
        """Raises RunError where the activation has no gate."""
        code, sae = view.forward.code, view.sae
        z_BF = evolve(code, z_BK=gate_pre(view, "term.gated_aux").relu()).dense()
        held = [sae.log_gain.exp(), sae.W_dec_FD, sae.b_dec_D]
        gain, weight_FD, bias_D = (x.detach() for x in held) if self.frozen else held
        hat_BD = gain * sae.machine.mesh.sum(z_BF @ weight_FD) + bias_D
        return self.weight * mean_square(hat_BD - view.forward.white_BD)
