"""Constraint `code_level`: how much code a feature may carry on average.

Shapes: B rows, F features, D d_model.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from attrs import evolve, field
from attrs.validators import ge, gt
from torch import Tensor

from spalf import Derived, Plan, View, constraint, from_knob


@constraint("code_level")
class CodeLevel:
    """Mean over rows and features of |h| stays at or below `level` (arXiv 2502.12179).

    h_j = gain z_j ||d_j||, the length of what feature j adds to the reconstruction in scaled coordinates, so that
    neither small codes on long rows nor a large gain make it cheap. A mean of .1 does not mean that a tenth of the
    features is active: for a count of features take `l0_rate`.

    `level` = 0 derives it from T = L0_target: sqrt(T d) / F is what T equal and orthogonal features need to carry a
    shift of typical length, sqrt(d) in scaled coordinates.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    partial: ClassVar[bool] = True
    dense: ClassVar[bool] = False

    level: float = field(default=0.0, validator=ge(0.0))
    target: int = from_knob("L0_target", validator=gt(0))

    def settle(self, plan: Plan) -> CodeLevel:
        """With the level filled in."""
        level = self.level or self._derived(plan.facts.d_model, plan.knobs.F)
        settled: CodeLevel = evolve(cast(Any, self), level=level)
        return settled

    def derive(self, plan: Plan) -> list[Derived]:
        """The budget's row for `spalf compile`."""
        is_derived = self.level == self._derived(plan.facts.d_model, plan.knobs.F)
        formula = "sqrt(L0_target * d_model) / F" if is_derived else "given"
        return [Derived(path="budget", value=self.level, formula=formula, origin="knobs.L0_target")]

    def _derived(self, d_model: int, width: int) -> float:
        return math.sqrt(self.target * d_model) / width

    def budget(self, view: View) -> Tensor:
        white_BD = view.forward.white_BD
        return white_BD.new_tensor(self.level or self._derived(white_BD.shape[-1], view.sae.width))

    def value(self, view: View) -> Tensor:
        code, sae = view.forward.code, view.sae
        length_F: Tensor = sae.log_gain.exp() * torch.linalg.vector_norm(sae.W_dec_FD, dim=1)
        if code.index_BK is not None:
            # Padding points at `width`: a length of 0.
            length_F = torch.cat([length_F, length_F.new_zeros(1)])[code.index_BK]
        return (code.z_BK.abs() * length_F).sum(-1).mean() / code.width
