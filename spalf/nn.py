"""The dictionary: two [F, D] matrices, biases, an activator and named row ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from spalf.core.protocols import Activator
from spalf.core.squares import affine
from spalf.core.values import Code, Machine, White


class StratifiedAutoencoder(nn.Module):
    """y_hat = gain * z W_dec + b_dec with z = activation(y W_enc' + b_enc), all in whitened coordinates.

    An activator with `pre_bias` reads (y - b_dec) W_enc' + b_enc; under one that `owns_bias`, b_enc is zero and frozen.

    The gain is one trained scalar, kept as its logarithm, so that the rows of both matrices can stay at unit scale:
    folding a small gain into the encoder makes Adam's relative steps there large enough to diverge.

    It starts in evaluation mode; a training step puts it into training mode for as long as it lasts.

    Shapes: W_enc_FD, W_dec_FD [F, D]; b_enc_F [F]; b_dec_D [D]; log_gain scalar. All float32.
    """

    def __init__(self, d_model: int, rows: Mapping[str, int], activator: Activator, machine: Machine) -> None:
        super().__init__()
        self.width = sum(rows.values())
        self._rows: dict[str, slice] = {}
        start = 0
        for name, n in rows.items():
            self._rows[name] = slice(start, start + n)
            start += n
        self.machine = machine
        self.W_enc_FD = nn.Parameter(torch.zeros(self.width, d_model, device=machine.device))
        self.W_dec_FD = nn.Parameter(torch.zeros(self.width, d_model, device=machine.device))
        self.b_enc_F = nn.Parameter(torch.zeros(self.width, device=machine.device))
        self.b_dec_D = nn.Parameter(torch.zeros(d_model, device=machine.device))
        self.log_gain = nn.Parameter(torch.zeros((), device=machine.device))
        self._activator = cast(nn.Module, activator).to(machine.device)
        self.b_enc_F.requires_grad_(not activator.owns_bias)
        self.eval()

    @property
    def rows(self) -> Mapping[str, slice]:
        """Row range of each stratum, in order."""
        return self._rows

    @property
    def activator(self) -> Activator:
        return cast(Activator, self._activator)

    def encode(self, white_BD: White, dense: bool = False) -> Code:
        """The code of whitened rows; `dense` lists every entry."""
        read_BD = White(white_BD - self.b_dec_D) if self.activator.pre_bias else white_BD
        return self.machine.ops.encode(read_BD, self, dense)

    def decode(self, code: Code) -> White:
        """Whitened reconstruction [B, D]."""
        summed_BD: Tensor = self.machine.mesh.sum(self.machine.ops.decode(code, self))
        return White(affine(summed_BD, self.log_gain.exp(), self.b_dec_D))
