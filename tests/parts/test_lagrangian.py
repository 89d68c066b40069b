"""Lagrangians: conformance, the augmented-Lagrangian identity and its gradients. M constraints, float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from spalf.core.slots import label
from spalf.core.values import Violations
from spalf.parts import lagrangian as module
from spalf.parts.lagrangian import AlCole, Plain
from spalf.testing import conform
from spalf.testing.control import drawn
from spalf.testing.lagrangian import controls

CLASSES = [cls for cls in vars(module).values() if isinstance(cls, type) and "__spalf__" in vars(cls)]
CHECKS = [pytest.param(check, id=f"{label(cls).use}-{check.__name__}") for cls in CLASSES for check in conform(cls)]
M = 10_000
ON = torch.ones(M, dtype=torch.bool)
G, LAM, RHO = drawn(0, M).double() * 2, drawn(1, M).double().clamp(min=0) * 3, drawn(2, M).double().exp()


@pytest.mark.parametrize("check", CHECKS)
def test_conforms(check: Any) -> None:
    check()


def test_both_are_here() -> None:
    assert {label(cls).use for cls in CLASSES} == {"al_cole", "plain"}


def al(g_M: Tensor, lam_M: Tensor, rho_M: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=g_M.dtype)
    out: Tensor = AlCole()(zero, Violations(names=(), g_M=g_M), controls(lam_M, rho_M, torch.ones_like(g_M).bool()))
    return out


def each(lam_M: Tensor) -> Tensor:
    """rho Psi(g, lam / rho) of every constraint alone, by the definition of Psi."""
    q_M = lam_M / RHO
    return RHO * ((2 * G + q_M).clamp(min=0).square() - q_M.square()) / 4


def test_matches_the_definition() -> None:
    assert torch.allclose(al(G, LAM, RHO), each(LAM).sum(), rtol=1e-12)
    for i in range(0, M, 500):
        one = slice(i, i + 1)
        assert torch.allclose(al(G[one], LAM[one], RHO[one]), each(LAM)[one].sum(), rtol=1e-9, atol=1e-12)


def test_identity_with_the_classical_form() -> None:
    """rho Psi(g, lam / rho) = ([lam + c g]+^2 - lam^2) / (2c) with c = 2 rho."""
    c = 2 * RHO
    classical_M = ((LAM + c * G).clamp(min=0).square() - LAM.square()) / (2 * c)
    assert torch.allclose(each(LAM), classical_M, atol=1e-10)
    assert torch.allclose(al(G, LAM, RHO), classical_M.sum(), rtol=1e-10)


def test_gradient_is_the_effective_multiplier() -> None:
    g_M = G.clone().requires_grad_()
    (grad_M,) = torch.autograd.grad(al(g_M, LAM, RHO), g_M)
    assert torch.allclose(grad_M, (LAM + 2 * RHO * G).clamp(min=0), atol=1e-10)


def test_derivative_by_the_multiplier() -> None:
    """max(g, -lam / (2 rho)): what dual ascent would follow, by finite differences."""
    h = 1e-6
    slope_M = (each(LAM + h) - each(LAM - h)) / (2 * h)
    assert torch.allclose(slope_M, torch.maximum(G, -LAM / (2 * RHO)), atol=1e-6)


def test_large_multipliers_do_not_cancel_in_float32() -> None:
    """Psi's two squares differ by 1e-8 of themselves here; the branch form keeps the small difference."""
    g_M, lam_M, rho_M = torch.tensor([1e-3]), torch.tensor([1e3]), torch.tensor([0.1])
    assert float(al(g_M, lam_M, rho_M)) == pytest.approx(1e3 * 1e-3 + 0.1 * 1e-6, rel=1e-6)


def test_a_detached_violation_trains_nothing() -> None:
    """The fault that a filtered violation in the loss would be: visible as a loss without gradient."""
    x = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    one, lam_M = torch.ones(1, dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    assert al(2 * x, lam_M, one).requires_grad
    assert not al((2 * x).detach(), lam_M, one).requires_grad


def test_plain_is_linear() -> None:
    loss = Plain()(torch.tensor(1.0), Violations(names=(), g_M=G), controls(LAM, RHO, ON))
    assert torch.allclose(loss, 1 + (LAM * G).sum())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: label(c).use)
def test_a_violation_that_is_nan_is_seen_in_the_loss(cls: type) -> None:
    g_M = torch.tensor([0.5, float("nan"), -2.0], dtype=torch.float64)
    on_M, ones_M = torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.float64)
    loss = cls()(torch.zeros((), dtype=torch.float64), Violations(names=(), g_M=g_M), controls(ones_M, ones_M, on_M))
    assert not bool(loss.isfinite())
