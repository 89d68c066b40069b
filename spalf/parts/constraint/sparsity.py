"""Constraints on how many features are active, or on how much: the mirror of sparsity as the objective."""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import field
from attrs.validators import ge, gt, le
from torch import Tensor

from spalf.core.recipe import Derived, Plan
from spalf.core.slots import constraint, from_knob
from spalf.core.values import View
from spalf.parts.constraint.derived import measured


@constraint("l0_rate")
class L0Rate:
    """Mean number of active features per row <= target.

    Its gradient is the activation's surrogate: an activation whose gate has none (`relu`, `gated`, and those that
    select by order) cannot meet it, and the run says so at its first step.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    partial: ClassVar[bool] = True
    dense: ClassVar[bool] = False
    capturable: ClassVar[bool] = True
    target: int = from_knob("L0_target", validator=gt(0))

    def budget(self, view: View) -> Tensor:
        return view.forward.white_BD.new_tensor(float(self.target))

    def value(self, view: View) -> Tensor:
        return view.forward.code.l0_B().mean()

    def derive(self, plan: Plan) -> list[Derived]:
        """The budget's row for `spalf compile`."""
        return [Derived(path="budget", value=self.target, formula="target", origin="target")]


@constraint("l1_rate")
class L1Rate:
    """Mean over rows of sum_j |gain| |z_j| ||w_j|| <= target, in whitened units.

    Each feature counts with the length of what it adds to the reconstruction, so that the bound cannot be met by small
    codes on long decoder rows. `target` 0 takes `share` times the value found on entering, which needs no knowledge of
    the scale. It bounds the L0 of rectified codes from neither side: compare the L0 that a run reports.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    partial: ClassVar[bool] = True
    dense: ClassVar[bool] = False
    target: float = field(default=0.0, validator=ge(0.0))
    share: float = field(default=0.1, validator=[gt(0.0), le(1.0)])

    @torch.no_grad()
    def budget(self, view: View) -> Tensor:
        if self.target:
            return view.forward.white_BD.new_tensor(self.target)
        return self.share * view.sae.machine.mesh.sum(self.value(view))

    def value(self, view: View) -> Tensor:
        code, sae = view.forward.code, view.sae
        norm_F: Tensor = torch.linalg.vector_norm(sae.W_dec_FD, dim=1)
        length_F = sae.log_gain.exp() * norm_F
        if code.index_BK is not None:
            length_F = torch.cat([length_F, length_F.new_zeros(1)])[code.index_BK]
        return (code.z_BK.abs() * length_F).sum(-1).mean()

    def derive(self, plan: Plan) -> list[Derived]:
        """The budget's row for `spalf compile`."""
        if self.target:
            return [Derived(path="budget", value=self.target, formula="target", origin="target")]
        return measured(self, plan, f"{self.share:g} * the value on entering")
