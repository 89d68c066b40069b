"""Activations: the kit's checks, the gradient of an expected loss, and what calibration promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spalf.core.recipe import Budget
from spalf.parts.activation import JumpReLU, JumpReLUActivator, JumpReLUMoreau
from spalf.testing import conform

CLASSES = (JumpReLU, JumpReLUMoreau)
BOTH = pytest.mark.parametrize("cls", CLASSES)


@pytest.mark.parametrize("check", [check for cls in CLASSES for check in conform(cls)])
def test_conforms(check) -> None:
    check()


def gaussian(n: int = 400_001) -> Tensor:
    """Pre-activations [n, 1] whose mean over entries is the expectation under a unit Gaussian, without sampling."""
    share = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.distributions.Normal(0.0, 1.0).icdf(share)[:, None]


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def made(cls: type, theta: float, eps: float, **options: object) -> JumpReLUActivator:
    activator = cls(**options).build(1).double()
    activator.log_threshold_F.data.fill_(math.log(theta))
    activator.bandwidth_F.fill_(eps)
    return activator


@BOTH
@pytest.mark.parametrize("theta", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_gradient_is_that_of_the_expected_loss(cls: type, theta: float, weight: float) -> None:
    """L = (p - d z)^2 + weight * gate: E[L] has the exact derivative (theta^2 (2 d - d^2) - weight) f(theta)."""
    d, p = 0.8, gaussian()
    # the window's own bias is of order eps / theta, for it averages the error on both sides
    activator = made(cls, theta, eps=0.02)
    z, gate = activator(p)
    ((p - d * z).square() + weight * gate).mean().backward()

    def expected(t: float) -> float:
        on = p[:, 0] > t
        return float(torch.where(on, ((1 - d) * p[:, 0]).square() + weight, p[:, 0].square()).mean())

    exact = (theta**2 * (2 * d - d * d) - weight) * density(theta)
    step = 0.02
    assert (expected(theta + step) - expected(theta - step)) / (2 * step) == pytest.approx(exact, rel=0.02, abs=2e-4)
    # log theta: one factor of theta more; the Moreau ramp looks at the density 2/3 eps above the threshold
    assert float(activator.log_threshold_F.grad) == pytest.approx(theta * exact, rel=0.02, abs=0.015 * theta * weight)


def test_the_window_is_tested_on_the_pre_activation() -> None:
    """On z it would see only its upper half, for z is 0 below the threshold: half of -theta f(theta)."""
    theta = 1.0
    activator = made(JumpReLU, theta, eps=0.1)
    activator(gaussian())[1].mean().backward()
    assert float(activator.log_threshold_F.grad) == pytest.approx(-theta * density(theta), rel=0.01)


def slope(cls: type, theta: float, eps: float, p: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """What each entry's gate gives to theta (as -d/dtheta) and to p."""
    at_theta, at_p = [], []
    for value in p:
        activator = made(cls, theta, eps, **options)
        leaf = value.reshape(1, 1).clone().requires_grad_(True)
        activator(leaf)[1].sum().backward()
        at_theta.append(-activator.log_threshold_F.grad / theta)
        at_p.append(torch.zeros_like(value)[None] if leaf.grad is None else leaf.grad[0])
    return torch.cat(at_theta), torch.cat(at_p)


def test_the_moreau_ramp_lies_above_the_threshold() -> None:
    theta, eps = 0.8, 0.4
    p = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21], dtype=torch.float64)
    at_theta, at_p = slope(JumpReLUMoreau, theta, eps, p)
    # (p - theta) / gamma with gamma = eps^2 / 2
    ramp = torch.tensor([0.0, 0.0, 0.01, 0.2, 0.39, 0.0], dtype=torch.float64) / (eps**2 / 2)
    assert torch.allclose(at_theta, ramp, atol=1e-12)
    assert not bool(at_p.any())
    assert torch.allclose(slope(JumpReLUMoreau, theta, eps, p, push=True)[1], ramp, atol=1e-12)


@pytest.mark.parametrize("cls", CLASSES)
def test_kernels_have_area_one(cls: type) -> None:
    theta, eps = 1.0, 0.2
    p = torch.linspace(0.7, 1.3, 4001, dtype=torch.float64)[:, None]
    activator = made(cls, theta, eps)
    activator(p)[1].sum().backward()
    area = -float(activator.log_threshold_F.grad) / theta * 0.6 / 4000
    assert area == pytest.approx(1.0, rel=5e-3)


def test_half_precision_is_widened() -> None:
    activator = JumpReLU().build(3)
    z, gate = activator(torch.tensor([[0.5, 1.5, 2.0]], dtype=torch.bfloat16))
    assert z.dtype == gate.dtype == torch.float32
    assert z.tolist() == [[0.0, 1.5, 2.0]]


@given(n=st.integers(2, 60), share=st.floats(0.0, 1.0), seed=st.integers(0, 5))
def test_calibration_counts_exactly_even_with_few_rows(n: int, share: float, seed: int) -> None:
    """Exactly round(density * n) entries, at least one and at most n - 1, of columns without ties or small values."""
    draw = torch.Generator().manual_seed(seed)
    pre = torch.rand(n, 4, generator=draw, dtype=torch.float64) + 1.0
    activator = JumpReLU().build(4).double()
    activator.calibrate_(pre, share, slice(0, 4))
    wanted = min(max(1, round(share * n)), n - 1)
    assert activator(pre)[1].sum(0).tolist() == [wanted] * 4


def test_calibration_touches_its_slice_only() -> None:
    activator = JumpReLU().build(6)
    before = activator.log_threshold_F.detach().clone(), activator.bandwidth_F.clone()
    activator.calibrate_(torch.randn(100, 2) * 3 + 4, 0.2, slice(2, 4))
    for now, was in zip((activator.log_threshold_F.detach(), activator.bandwidth_F), before, strict=True):
        changed = (now != was).tolist()
        assert changed == [False, False, True, True, False, False]


def test_thresholds_and_windows_have_a_floor() -> None:
    activator = JumpReLU(floor=0.02).build(2)
    activator.calibrate_(torch.stack([-torch.ones(50), torch.zeros(50)], dim=1), 0.1, slice(0, 2))
    assert torch.allclose(activator.threshold_F(), torch.full((2,), 0.02))
    assert float(activator.bandwidth_F.min()) == pytest.approx(0.02)


def test_one_row_cannot_be_calibrated_on() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        JumpReLU().build(2).calibrate_(torch.ones(1, 2), 0.1, slice(0, 2))


@pytest.mark.parametrize("wanted", [0.004, 0.05])
def test_windows_widen_until_they_are_occupied(wanted: float) -> None:
    """A rare feature's window of a tenth of an interquartile range is empty; a share of the sample has to lie in it."""
    torch.manual_seed(1)
    pre = torch.cat([0.05 * torch.randn(980, 8), 3 + torch.randn(20, 8)])
    bandwidths = []
    for occupancy in (1e-9, wanted):
        activator = JumpReLU(occupancy=occupancy).build(8)
        activator.calibrate_(pre, 0.01, slice(0, 8))
        inside = (pre - activator.threshold_F()).abs() < activator.bandwidth_F / 2
        bandwidths.append(activator.bandwidth_F.clone())
    least = math.ceil(wanted * 1000)
    assert all(least <= count <= least + 2 for count in inside.sum(0).tolist())
    assert bool((bandwidths[1] >= bandwidths[0]).all())


@BOTH
def test_settling_asks_for_one_entry_per_batch(cls: type) -> None:
    plan = type("Plan", (), {"recipe": type("Recipe", (), {"budget": Budget(batch=512)})})
    assert cls().settle(plan).occupancy == 1 / 512
    assert cls(occupancy=0.25).settle(plan).occupancy == 0.25
    rows = [cls(occupancy=given).settle(plan).derive(plan)[0] for given in (0.0, 0.25)]
    assert [(row.path, row.value, row.formula) for row in rows] == [
        ("occupancy", 1 / 512, "1 / budget.batch"),
        ("occupancy", 0.25, "given"),
    ]
