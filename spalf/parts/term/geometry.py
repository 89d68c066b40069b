"""Terms on the shape of code and dictionary."""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import field
from attrs.validators import ge, gt, lt
from torch import Tensor

from spalf.core.slots import term
from spalf.core.values import View
from spalf.errors import RunError


@term("discretization")
class Discretization:
    """w(t) times the mean over rows and features of (p - z)^2 / Var(p_j) where 0 < p < theta; w = 0 before `start`.

    Idea of the discretisation correction of 2510.18784, which corrects quantised weights: none of its theorems covers
    this form. Without the division and below zero the term would penalise the size of every inactive pre-activation.
    Ramp with r = t / T: w = weight * max(0, r - start) / (1 - start).
    """

    partial: ClassVar[bool] = True
    dense: ClassVar[bool] = True
    weight: float = field(default=1.0, validator=gt(0.0))
    start: float = field(default=0.8, validator=[ge(0.0), lt(1.0)])

    def value(self, view: View) -> Tensor:
        """Raises RunError on a compact code, which leaves out the entries in question."""
        code = view.forward.code
        if code.index_BK is not None:
            raise RunError("term.discretization: needs a dense code, and was given a compact one (encode with dense)")
        ramp = self.weight * max(0.0, view.clock.progress - self.start) / (1 - self.start)
        pre_BF, threshold_F = code.pre_BK, view.sae.activator.threshold_F().detach()
        below_BF = ((pre_BF > 0) & (pre_BF < threshold_F)).to(pre_BF.dtype)
        variance_F = pre_BF.detach().var(dim=0, correction=0).clamp(min=1e-8)
        gap_BF = (pre_BF - code.z_BK) * below_BF
        return ramp * (gap_BF.square() / variance_F).sum(-1).mean() / code.width


@term("frame_energy")
class FrameEnergy:
    """weight / d times ||D D' / tr(D D') - I / d||_F^2 over the rows of a stratum (2602.02224): 0 for a tight frame.

    D holds the decoder rows of `stratum` as columns, in whitened coordinates.
    """

    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    weight: float = field(default=0.1, validator=gt(0.0))
    stratum: str = "free"

    def value(self, view: View) -> Tensor:
        """Raises RunError where the dictionary has no such stratum."""
        if self.stratum not in view.sae.rows:
            raise RunError(
                f'term.frame_energy.stratum: "{self.stratum}" is none of {", ".join(view.sae.rows)} (name one of them)'
            )
        rows_AD = view.sae.W_dec_FD[view.sae.rows[self.stratum]]
        d_model = rows_AD.shape[1]
        frame_DD = rows_AD.T @ rows_AD
        eye_DD = torch.eye(d_model, dtype=frame_DD.dtype, device=frame_DD.device)
        energy = (frame_DD / frame_DD.trace() - eye_DD / d_model).square().sum()
        return self.weight / d_model * energy
