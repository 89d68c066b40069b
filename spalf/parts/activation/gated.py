"""A gate and a magnitude on one shared encoder."""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import field
from attrs.validators import ge
from torch import Tensor, nn

from spalf.core.protocols import Activator
from spalf.core.slots import activation
from spalf.parts.activation.entries import listed, upper_quantiles, wide


class GatedActivator(nn.Module, Activator):
    """z = 1[pi > 0] ReLU(exp(r_mag) p + b_mag) with pi = p + b_gate; the encoder's own bias stays at zero.

    Parameters b_gate_F, b_mag_F, r_mag_F. The gate has no gradient: pi is trained by the terms that read `gate_pre`.
    """

    owns_bias = True

    def __init__(self, width: int, options: Gated) -> None:
        super().__init__()
        self.pre_bias = options.pre_bias
        self.b_gate_F = nn.Parameter(torch.zeros(width))
        self.b_mag_F = nn.Parameter(torch.zeros(width))
        self.r_mag_F = nn.Parameter(torch.zeros(width))

    def forward(self, pre_BK: Tensor, index_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(z_BK, gate_BK) in at least float32; an entry is active where gate and magnitude are positive."""
        magnitude_BK = listed(self.r_mag_F.exp(), index_BK, 1.0) * wide(pre_BK) + listed(self.b_mag_F, index_BK, 0.0)
        with torch.no_grad():
            is_on_BK = (self.gate_pre(pre_BK, index_BK) > 0) & (magnitude_BK > 0)
            gate_BK = is_on_BK.to(magnitude_BK.dtype)
        return magnitude_BK * gate_BK, gate_BK

    def gate_pre(self, pre_BK: Tensor, index_BK: Tensor | None = None) -> Tensor:
        """pi = p + b_gate, with its graph; 0 at padding."""
        return wide(pre_BK) + listed(self.b_gate_F, index_BK, 0.0)

    @torch.no_grad()
    def calibrate_(self, pre_BC: Tensor, density: float, rows: slice) -> None:
        """b_gate = minus the upper quantile of p; density 0 leaves it at zero, as published."""
        if density > 0:
            self.b_gate_F.data[rows] = -upper_quantiles(pre_BC, density).clamp(min=0).to(self.b_gate_F)

    @torch.no_grad()
    def reach_F(self) -> Tensor:
        """-b_gate: below it neither the code nor ReLU(pi) has a value or a gradient."""
        return -self.b_gate_F

    def threshold_F(self) -> Tensor:
        """max(-b_gate, -b_mag exp(-r_mag)): where gate and magnitude are both positive."""
        return torch.maximum(-self.b_gate_F, -self.b_mag_F * (-self.r_mag_F).exp())

    def affine_F(self) -> tuple[Tensor, Tensor]:
        """(exp(r_mag), b_mag)."""
        return self.r_mag_F.exp(), self.b_mag_F


@activation("gated")
class Gated:
    """A Heaviside gate times a rectified magnitude that shares its encoder row (arXiv 2404.16014).

    Sparsity presses on the gate alone (terms `l1` with of = "gate", and `gated_aux`), so that magnitudes do not shrink.
    At inference it is a JumpReLU, and is exported as one. `start`: active features at the start of training as a
    multiple of the target, 0 for zero biases, as published. `pre_bias`: encode y - b_dec.
    """

    has_gate: ClassVar[bool] = True

    start: float = field(default=0.0, validator=ge(0.0))
    pre_bias: bool = False

    def build(self, width: int) -> Activator:
        return GatedActivator(width, self)
