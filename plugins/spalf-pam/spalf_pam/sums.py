"""Sufficient statistics of codes and targets: all that a decoder in closed form has to know of the data.

Shape letters, here and in the package: B rows, D d_model, F features, K listed entries per row.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

LIVE = 1e-12
"""A feature whose mean square is below this share of the average one is dead: its column says nothing."""


@frozen(kw_only=True, eq=False)
class Sums:
    """Weighted sums over rows of codes z [F] and targets y [D], float64, changed in place.

    count c, energy sum ||y||^2 (scalars), G_FF = sum z z', H_FD = sum z y', s_F = sum z, t_D = sum y. G alone takes
    8 F^2 bytes: 2.1 GB at F = 16,384, 8.6 GB at 32,768, 34 GB at 65,536.
    """

    count: Tensor
    energy: Tensor
    G_FF: Tensor
    H_FD: Tensor
    s_F: Tensor
    t_D: Tensor

    def add_(self, z_BF: Tensor, y_BD: Tensor, decay: float = 1.0) -> Sums:
        """Add a batch; what was there before is first multiplied by `decay`. Returns itself."""
        z_BF, y_BD = z_BF.detach().double(), y_BD.detach().double()
        if decay != 1.0:
            for total in self._all():
                total.mul_(decay)
        self.count.add_(z_BF.shape[0])
        self.energy.add_(y_BD.square().sum())
        self.G_FF.addmm_(z_BF.T, z_BF)
        self.H_FD.addmm_(z_BF.T, y_BD)
        self.s_F.add_(z_BF.sum(0))
        self.t_D.add_(y_BD.sum(0))
        return self

    def zero_(self) -> Sums:
        """Forget everything. Returns itself."""
        for total in self._all():
            total.zero_()
        return self

    def rescale_(self, c_F: Tensor) -> Sums:
        """The sums of the codes c * z, for c_F [F]. Returns itself."""
        c_F = c_F.to(self.s_F)
        self.G_FF.mul_(c_F).mul_(c_F[:, None])
        self.H_FD.mul_(c_F[:, None])
        self.s_F.mul_(c_F)
        return self

    def live_F(self) -> Tensor:
        """Which features have fired, bool [F]."""
        square_F = self.G_FF.diagonal()
        return square_F > LIVE * square_F.mean()

    def scale(self) -> Tensor:
        """tr(G - s s' / c) / live features, a scalar: the unit in which a relative ridge is measured."""
        spread_F = self.G_FF.diagonal() - self.s_F.square() / self.count.clamp(min=1e-300)
        return spread_F.sum().clamp(min=0) / self.live_F().sum().clamp(min=1)

    def error(self, w_FD: Tensor, b_D: Tensor) -> Tensor:
        """sum ||y - z w - b||^2 over the rows, a float64 scalar, without going through them again.

        A difference of large sums: its absolute error is about 1e-15 of `energy`.
        """
        w_FD, b_D = w_FD.double(), b_D.double()
        linear = (w_FD * self.H_FD).sum() + b_D @ self.t_D
        square = (w_FD * (self.G_FF @ w_FD)).sum() + 2 * b_D @ (w_FD.T @ self.s_F) + self.count * b_D.square().sum()
        return self.energy - 2 * linear + square

    def _all(self) -> tuple[Tensor, ...]:
        return self.count, self.energy, self.G_FF, self.H_FD, self.s_F, self.t_D


def empty(width: int, d_model: int, device: torch.device | None = None) -> Sums:
    """Sums over no rows."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    return Sums(
        count=zeros(),
        energy=zeros(),
        G_FF=zeros(width, width),
        H_FD=zeros(width, d_model),
        s_F=zeros(width),
        t_D=zeros(d_model),
    )
