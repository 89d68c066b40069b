"""What every Lagrangian must do. M constraints, float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spalf.core.state import ControlState
from spalf.core.values import Violations
from spalf.parts.dual import LamState
from spalf.parts.penalty import ConstantState
from spalf.testing import Check
from spalf.testing.control import drawn

M = 64
NAMES = tuple(f"c{i}" for i in range(M))
ON = torch.ones(M, dtype=torch.bool)
F = torch.tensor(0.7, dtype=torch.float64)
"""The objective's value."""


def controls(lam_M: Tensor, rho_M: Tensor, on_M: Tensor) -> ControlState:
    """A ControlState with these multipliers and penalties; its filter is absent, as no Lagrangian reads it."""
    dual, penalty = LamState(lam_M=lam_M), ConstantState(rho_M=rho_M)
    return ControlState(budget_M=torch.ones_like(lam_M), on_M=on_M, filter=None, dual=dual, penalty=penalty)


def lagrangian_checks(lagrangian: Any) -> list[Check]:
    """The checks of one Lagrangian."""
    return _values(lagrangian) + _gradients(lagrangian)


def _multipliers() -> Tensor:
    lam_M = drawn(1, M).double().abs() * 3
    lam_M[::4] = 0.0
    return lam_M


LAM, RHO = _multipliers(), drawn(2, M).double().exp()


def _value(lagrangian: Any, g_M: Tensor, mask_M: Tensor = ON) -> Tensor:
    out: Tensor = lagrangian(F, Violations(names=NAMES, g_M=g_M), controls(LAM, RHO, mask_M))
    return out


def _values(lagrangian: Any) -> list[Check]:
    def equals_the_objective_when_nothing_is_on() -> None:
        assert torch.equal(_value(lagrangian, drawn(3, M).double(), ~ON), F)

    def non_decreasing_in_g() -> None:
        grid = torch.linspace(-3, 3, 61, dtype=torch.float64)
        totals = torch.stack([_value(lagrangian, torch.full((M,), float(x), dtype=torch.float64)) for x in grid])
        assert bool((totals.diff() >= -1e-12).all())
        assert bool(totals[-1] > totals[0])

    return [equals_the_objective_when_nothing_is_on, non_decreasing_in_g]


def _gradients(lagrangian: Any) -> list[Check]:
    def derivative_matches_finite_differences() -> None:
        h, g_M = 1e-6, drawn(4, M).double().requires_grad_()
        (grad_M,) = torch.autograd.grad(_value(lagrangian, g_M), g_M)
        at_M, steps = g_M.detach(), torch.eye(M, dtype=torch.float64) * h
        ahead_M = torch.stack([_value(lagrangian, at_M + e) - _value(lagrangian, at_M - e) for e in steps]) / (2 * h)
        assert torch.allclose(grad_M, ahead_M, atol=1e-6)

    def off_constraints_have_no_gradient() -> None:
        mask_M, g_M = torch.arange(M) % 2 == 0, drawn(5, M).double().abs().requires_grad_()
        (grad_M,) = torch.autograd.grad(_value(lagrangian, g_M, mask_M), g_M)
        assert bool((grad_M[~mask_M] == 0).all())
        assert bool((grad_M[mask_M] > 0).any())

    def the_objective_keeps_weight_one() -> None:
        objective = F.clone().requires_grad_()
        loss = lagrangian(objective, Violations(names=NAMES, g_M=drawn(6, M).double()), controls(LAM, RHO, ON))
        assert float(torch.autograd.grad(loss, objective)[0]) == 1.0

    def multipliers_are_constants() -> None:
        lam_M, rho_M = LAM.clone().requires_grad_(), RHO.clone().requires_grad_()
        g_M = drawn(7, M).double().abs().requires_grad_()
        loss = lagrangian(F, Violations(names=NAMES, g_M=g_M), controls(lam_M, rho_M, ON))
        loss.backward()
        assert lam_M.grad is None, "the loss has a gradient in the multipliers"
        assert rho_M.grad is None, "the loss has a gradient in the penalties"

    return [
        derivative_matches_finite_differences,
        off_constraints_have_no_gradient,
        the_objective_keeps_weight_one,
        multipliers_are_constants,
    ]
