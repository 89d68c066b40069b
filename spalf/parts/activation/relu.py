"""The plain rectifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spalf.core.protocols import Activator
from spalf.core.slots import activation
from spalf.parts.activation.entries import wide


class ReLUActivator(nn.Module, Activator):
    """z = max(0, p), active where p > 0. Holds nothing that a checkpoint would keep."""

    zero_F: Tensor

    def __init__(self, width: int, options: ReLU) -> None:
        super().__init__()
        self.pre_bias = options.pre_bias
        self.register_buffer("zero_F", torch.zeros(width), persistent=False)

    def forward(self, pre_BK: Tensor, index_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(z_BK, gate_BK) in at least float32; the gate has no gradient."""
        z_BK = wide(pre_BK).relu()
        return z_BK, (z_BK.detach() > 0).to(z_BK.dtype)

    def calibrate_(self, pre_BC: Tensor, density: float, rows: slice) -> None:
        """Has no threshold: the density follows from the encoder's bias, which starts at zero."""

    def reach_F(self) -> Tensor:
        """Zeros [F]."""
        return self.zero_F

    def threshold_F(self) -> Tensor:
        """Zeros [F]."""
        return self.zero_F


@activation("relu")
class ReLU:
    """z = max(0, p), on the encoder's bias alone.

    It starts with half of its features active and is made sparse by the term `l1`, which also shrinks what stays. The
    count of active features has no gradient here, so the term `l0` is refused. `pre_bias`: encode y - b_dec.
    """

    pre_bias: bool = False

    def build(self, width: int) -> Activator:
        return ReLUActivator(width, self)
