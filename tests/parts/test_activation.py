"""Activations: the kit's checks, the gradient of an expected loss, and what calibration promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spalf.core.recipe import Budget
from spalf.core.values import Code
from spalf.parts.activation import (
    BatchTopK,
    BatchTopKActivator,
    Gated,
    GatedActivator,
    JumpReLU,
    JumpReLUActivator,
    JumpReLUMoreau,
    ReLU,
    TopK,
)
from spalf.parts.activation.entries import order_statistics
from spalf.testing import conform

CLASSES = (JumpReLU, JumpReLUMoreau)
EVERY = (*CLASSES, ReLU, TopK, BatchTopK, Gated)
BOTH = pytest.mark.parametrize("cls", CLASSES)


@pytest.mark.parametrize("check", [check for cls in EVERY for check in conform(cls)])
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


# ------------------------------------------------------------------------------------------------- selection by order
def rows(n: int = 64, width: int = 20, seed: int = 2) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(k=st.integers(1, 20), seed=st.integers(0, 5))
def test_topk_keeps_the_k_largest_and_then_rectifies(k: int, seed: int) -> None:
    pre = rows(seed=seed)
    z, gate = TopK(k=k).build(20)(pre)
    order = pre.argsort(dim=1, descending=True)
    for row, (ours, first) in enumerate(zip(z, order[:, :k], strict=True)):
        wanted = torch.zeros(20, dtype=torch.float64)
        wanted[first] = pre[row, first].clamp(min=0)
        assert torch.equal(ours, wanted)
    assert torch.equal(gate, (z > 0).double())


def test_topk_breaks_ties_and_takes_all_of_a_narrow_dictionary() -> None:
    assert TopK(k=3).build(8)(torch.ones(5, 8))[1].sum(1).tolist() == [3.0] * 5
    assert TopK(k=9).build(4)(torch.ones(5, 4))[1].sum(1).tolist() == [4.0] * 5


def test_the_gradient_of_a_selection_passes_what_it_keeps() -> None:
    for option in (TopK(k=3), BatchTopK(k=3)):
        pre = rows().requires_grad_(True)
        z, gate = option.build(20).train()(pre)
        assert not gate.requires_grad
        (gradient,) = torch.autograd.grad((z * torch.arange(20.0)).sum(), pre)
        assert torch.equal(gradient, gate * torch.arange(20.0))


@given(k=st.integers(1, 8), seed=st.integers(0, 5))
def test_batch_topk_keeps_b_k_entries_of_a_batch(k: int, seed: int) -> None:
    pre = rows(seed=seed)
    z, gate = BatchTopK(k=k).build(20).train()(pre)
    assert int(gate.sum()) == min(64 * k, int((pre > 0).sum()))
    assert float(z[gate > 0].min()) >= float(pre[gate == 0].max())
    assert len(set(gate.sum(1).tolist())) > 1, "every row keeps the same number: that is no selection over the batch"


def code_of(activator: BatchTopKActivator, pre: Tensor) -> Code:
    z, gate = activator(pre)
    fits = torch.zeros((), dtype=torch.bool)
    return Code(pre_BK=pre, gate_BK=gate, z_BK=z, index_BK=None, width=20, overflow=fits)


def test_the_threshold_starts_at_the_first_batch_and_then_averages() -> None:
    """An average that starts at 0 stays low for 1 / rate batches: a known fault elsewhere."""
    activator = BatchTopK(k=2, rate=0.25).build(20).double().train()
    least = []
    for seed in range(12):
        code = code_of(activator, rows(seed=seed))
        least.append(float(code.z_BK[code.gate_BK > 0].min()))
        activator.observe_(code)
        wanted = sum(least[:4]) / len(least[:4])
        for value in least[4:]:
            wanted = 0.75 * wanted + 0.25 * value
        assert float(activator.threshold) == pytest.approx(wanted, rel=1e-12)


def test_a_batch_without_an_active_entry_moves_no_threshold() -> None:
    activator = BatchTopK(k=2).build(20).train()
    activator.calibrate_(rows(), 0.1, slice(0, 20))
    before = {k: v.clone() for k, v in activator.state_dict().items()}
    activator.observe_(code_of(activator, -torch.ones(4, 20)))
    assert all(torch.equal(v, before[k]) for k, v in activator.state_dict().items())


def test_at_inference_the_threshold_of_the_training_batches_gives_nearly_k() -> None:
    activator = BatchTopK(k=2).build(20).double().train()
    for seed in range(100):
        activator.observe_(code_of(activator, rows(256, seed=seed)))
    assert float(activator.eval()(rows(4096, seed=1000))[1].sum(1).mean()) == pytest.approx(2, rel=0.05)


def test_batch_topk_calibrates_over_chunks() -> None:
    pre = rows(4000) * torch.linspace(0.9, 1.1, 20, dtype=torch.float64)
    activator = BatchTopK(k=2).build(20).double()
    for begin in range(0, 20, 5):
        activator.calibrate_(pre[:, begin : begin + 5], 0.1, slice(begin, begin + 5))
    assert float(activator.eval()(pre)[1].mean()) == pytest.approx(0.1, rel=0.05)


# --------------------------------------------------------------------------------------------------------------- gated
def gated(seed: int = 3) -> GatedActivator:
    activator = Gated().build(20).double()
    draw = torch.Generator().manual_seed(seed)
    for parameter in activator.parameters():
        parameter.data = 0.7 * torch.randn(20, generator=draw, dtype=torch.float64)
    return activator


def test_gated_against_its_formula() -> None:
    activator, pre = gated(), rows()
    z, gate = activator(pre)
    b_gate, b_mag, r_mag = (p.detach() for p in (activator.b_gate_F, activator.b_mag_F, activator.r_mag_F))
    magnitude = (r_mag.exp() * pre + b_mag).clamp(min=0)
    assert torch.allclose(z, (pre + b_gate > 0) * magnitude)
    assert torch.equal(gate, ((pre + b_gate > 0) & (magnitude > 0)).double())
    assert int(((pre + b_gate > 0) & (magnitude == 0)).sum()) > 0, "no entry whose gate alone is open"
    assert int(((pre + b_gate <= 0) & (magnitude > 0)).sum()) > 0, "no entry whose gate alone is shut"


def test_the_code_gives_the_gate_no_gradient_and_its_pre_activation_does() -> None:
    activator, pre = gated(), rows()
    activator(pre)[0].sum().backward()
    assert activator.b_gate_F.grad is None
    assert bool(activator.b_mag_F.grad.any())
    activator.gate_pre(pre).relu().sum().backward()
    assert torch.equal(activator.b_gate_F.grad, (activator.gate_pre(pre) > 0).sum(0).double())


def test_gated_starts_as_published_unless_it_is_asked_for_a_density() -> None:
    activator = Gated().build(20)
    activator.calibrate_(rows().float(), 0.0, slice(0, 20))
    assert not any(bool(p.any()) for p in activator.parameters())


# ------------------------------------------------------------------------------------------------------ a known fault
def test_the_count_tested_on_the_code_presses_half_as_hard() -> None:
    theta = 1.0
    grads = []
    for post in (False, True):
        activator = made(JumpReLU, theta, eps=0.1, post=post)
        activator(gaussian())[1].mean().backward()
        grads.append(float(activator.log_threshold_F.grad))
    assert grads[1] == pytest.approx(grads[0] / 2, rel=0.05)
    # the reconstruction's own window stays whole
    both = []
    for post in (False, True):
        activator = made(JumpReLU, theta, eps=0.1, post=post)
        activator(gaussian())[0].mean().backward()
        both.append(float(activator.log_threshold_F.grad))
    assert both[0] == both[1]


@pytest.mark.parametrize("n", [1, 7, 100])
def test_order_statistics_are_those_of_a_sort(n: int) -> None:
    x_CB = torch.randn(5, n, generator=torch.Generator().manual_seed(n)).round(decimals=1)
    places = sorted({1, (n + 1) // 2, n})
    ordered_CB = x_CB.sort(dim=1).values
    for found_C, place in zip(order_statistics(x_CB, places), places, strict=True):
        assert torch.equal(found_C, ordered_CB[:, place - 1])
