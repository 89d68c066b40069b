"""Lagrangians: one scalar to descend from objective, violations, multipliers and penalties. M constraints.

They take this batch's violations with their graph; multipliers and penalties are constants to them.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from spalf.core.slots import lagrangian
from spalf.core.state import ControlState
from spalf.core.values import Violations


@lagrangian("al_cole")
class AlCole:
    """f + sum_i rho_i Psi(g_i, lam_i / rho_i), Psi(x, q) = (max(0, 2x + q)^2 - q^2) / 4 (arXiv 2510.20995).

    Its gradient with respect to g_i is the effective multiplier [lam_i + 2 rho_i g_i]+.
    """

    capturable: ClassVar[bool] = True

    def __call__(self, objective: Tensor, violations: Violations, control: ControlState) -> Tensor:
        g_M, rho_M = violations.g_M, control.rho_M.detach()
        q_M = control.lam_M.detach() / rho_M
        # Psi in its two branches: the squares above cancel in float32 once q is large.
        # NaN is not <= 0: it stays in the loss, where it is seen.
        psi_M = torch.where(2 * g_M + q_M <= 0, -q_M.square() / 4, g_M * (g_M + q_M))
        return objective + torch.where(control.on_M, rho_M * psi_M, 0.0).sum()


@lagrangian("plain")
class Plain:
    """f + sum_i lam_i g_i, without penalties."""

    capturable: ClassVar[bool] = True

    def __call__(self, objective: Tensor, violations: Violations, control: ControlState) -> Tensor:
        return objective + torch.where(control.on_M, control.lam_M.detach() * violations.g_M, 0.0).sum()
