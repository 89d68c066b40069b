"""Constraint `density`: how much of the firing may be done by features that fire nearly everywhere."""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import field
from attrs.validators import gt, le, lt
from torch import Tensor

from spalf import Code, View, constraint, from_knob


def frequency_F(code: Code) -> Tensor:
    """Share of the batch's rows that fire each feature, [F] in [0, 1]; differentiable through the gate's surrogate."""
    gate_BK = code.gate_BK.float()
    if code.index_BK is None:
        return gate_BK.mean(0)
    # Padding points at `width`: one entry more, cut off again. Never [B, F].
    sum_F = gate_BK.new_zeros(code.width + 1).scatter_add(0, code.index_BK.reshape(-1), gate_BK.reshape(-1))
    return sum_F[: code.width] / gate_BK.shape[0]


@constraint("density")
class Density:
    """Firing above `cap`, summed over features, stays below `share` of the target L0.

    value = sum_j [freq_j - cap]+ and budget = share * L0_target, both in active features per token. The budget counts
    from the target and not from the measured L0: a ratio to the latter could be met by firing more elsewhere.

    Dense latents can carry meaning (arXiv 2506.15679), hence a budget and not a ban: the multiplier is the price, in
    L0, of keeping them out. A feature near `cap` adds up to sqrt(cap / (2 pi B)) to the value by chance, B being the
    batch, so `share` should be well above 0 and the batch large against 1 / cap.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    partial: ClassVar[bool] = True
    dense: ClassVar[bool] = False

    target: int = from_knob("L0_target", validator=gt(0))
    cap: float = field(default=0.1, validator=[gt(0.0), lt(1.0)])
    share: float = field(default=0.1, validator=[gt(0.0), le(1.0)])

    def budget(self, view: View) -> Tensor:
        return torch.tensor(self.share * self.target, device=view.forward.white_BD.device)

    def value(self, view: View) -> Tensor:
        return (frequency_F(view.forward.code) - self.cap).clamp(min=0).sum()  # sum_j [freq_j - cap]+
