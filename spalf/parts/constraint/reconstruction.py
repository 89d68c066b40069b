"""Constraints on the reconstruction error of a batch."""

from __future__ import annotations

from typing import ClassVar

from attrs import field
from attrs.validators import gt, in_, lt
from torch import Tensor

from spalf.core.recipe import Derived, Plan
from spalf.core.slots import constraint, from_knob
from spalf.core.values import View, White
from spalf.kernels.squares import sum_of_squares
from spalf.parts.constraint.derived import measured


def squared_error(view: View, space: str) -> Tensor:
    """Mean over rows of ||x - x_hat||^2 in raw or whitened coordinates, a scalar."""
    # In this order the reconstruction's gradient needs no change of sign, which would be a pass of its own.
    error_BD = White(view.forward.white_hat_BD - view.forward.white_BD)
    total = view.metric.raw_square(error_BD) if space == "raw" else sum_of_squares(error_BD)
    return total / error_BD.shape[0]


@constraint("faithfulness")
class Faithfulness:
    """mean_b ||x - x_hat||^2 <= (1 - r2) times the total variance, both in one space.

    `space`: "raw", error and variance (tr S) in model space, or "white", in whitened coordinates (d_eff). Fitting the
    whitened error gives weight to directions that the language model hardly uses, so "raw" is the default.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    capturable: ClassVar[bool] = True
    r2: float = from_knob("R2_target", validator=[gt(0.0), lt(1.0)])
    space: str = field(default="raw", validator=in_(("raw", "white")))

    def budget(self, view: View) -> Tensor:
        return (1 - self.r2) * view.metric.variance(self.space).detach()

    def value(self, view: View) -> Tensor:
        return squared_error(view, self.space)

    def derive(self, plan: Plan) -> list[Derived]:
        """The budget's row for `spalf compile`."""
        variance = {"raw": "tr S", "white": "sum l / (l + alpha)"}[self.space]
        return measured(self, plan, f"(1 - {self.r2:g}) * {variance}")
