"""Terms: the kit's checks, and each value against its formula."""

import math

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from spalf.core.values import Clock
from spalf.errors import RunError
from spalf.parts.activation import JumpReLU
from spalf.parts.kernel import TorchOps
from spalf.parts.term import L0, L1, Discretization, FrameEnergy
from spalf.testing import conform
from spalf.testing.toy import toy_view


@pytest.mark.parametrize("check", [check for cls in (L0, L1, Discretization, FrameEnergy) for check in conform(cls)])
def test_conforms(check) -> None:
    check()


def test_l0_is_a_ratio_and_moves_thresholds_alone() -> None:
    view = toy_view()
    value = L0(target=5).value(view)
    value.backward()
    assert float(value.detach()) == pytest.approx(int((view.forward.code.z_BK > 0).sum()) / 64 / 5)
    moved = {n for n, p in view.sae.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == {"_activator.log_threshold_F"}
    gradient_F = dict(view.sae.named_parameters())["_activator.log_threshold_F"].grad
    assert gradient_F is not None
    assert bool((gradient_F <= 0).all()), "a higher threshold cannot raise the count"


def test_l1_cannot_be_lowered_by_rescaling() -> None:
    """Codes by c with decoder rows, or the gain, by 1/c: the same reconstruction, the same value."""
    view = toy_view()
    before = float(L1(target=4).value(view).detach())
    halved = evolve(view.forward.code, z_BK=view.forward.code.z_BK / 2)
    smaller = evolve(view, forward=evolve(view.forward, code=halved))
    with torch.no_grad():
        view.sae.W_dec_FD.mul_(2)
    assert float(L1(target=4).value(smaller).detach()) == pytest.approx(before, rel=1e-5)
    with torch.no_grad():
        view.sae.W_dec_FD.div_(2)
        view.sae.log_gain.fill_(math.log(2))
    assert float(L1(target=4).value(smaller).detach()) == pytest.approx(before, rel=1e-5)


def test_l1_against_a_loop() -> None:
    view = toy_view(rows=3)
    z_BF, w_FD = view.forward.code.dense().detach(), view.sae.W_dec_FD.detach()
    wanted = sum(float(z_BF[b, f] * w_FD[f].norm()) for b in range(3) for f in range(48)) / 3 / 7
    assert float(L1(target=7).value(view).detach()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("progress", "ramp"), [(0.0, 0.0), (0.8, 0.0), (0.9, 0.5), (1.0, 1.0)])
def test_discretization_ramps(progress: float, ramp: float) -> None:
    view = toy_view()
    at = evolve(view, clock=Clock(step=round(1000 * progress), total=1000))
    full = Discretization(weight=1.0, start=0.0).value(evolve(view, clock=Clock(step=1, total=1)))
    value = Discretization(weight=3.0).value(at).detach()
    assert float(value) == pytest.approx(3 * ramp * float(full.detach()), rel=1e-5)


def test_discretization_reaches_inactive_positive_entries_alone() -> None:
    view = toy_view()
    code = view.forward.code
    (gradient_BF,) = torch.autograd.grad(Discretization().value(view), code.pre_BK)
    inside = (code.pre_BK > 0) & (code.pre_BK < view.sae.activator.threshold_F())
    assert 0 < int(inside.sum()) < inside.numel()
    assert torch.equal(gradient_BF != 0, inside)
    variance_F = code.pre_BK.detach().var(dim=0, correction=0)
    wanted = 2 * code.pre_BK.detach() * inside / variance_F / inside.numel()
    assert torch.allclose(gradient_BF, wanted, rtol=1e-4, atol=1e-9)


def test_discretization_refuses_a_list() -> None:
    with pytest.raises(RunError, match="dense code"):
        Discretization().value(toy_view(dense=False, ops=TorchOps(code="compact"), activation=JumpReLU()))


def test_frame_energy_is_zero_for_a_tight_frame() -> None:
    view = toy_view()
    with torch.no_grad():
        view.sae.W_dec_FD[view.sae.rows["free"]] = torch.linalg.qr(torch.randn(32, 12)).Q
    assert float(FrameEnergy().value(view).detach()) == pytest.approx(0.0, abs=1e-9)


@given(seed=st.integers(0, 20))
def test_frame_energy_has_the_published_gradient(seed: int) -> None:
    """(4 / t) (Phi - (<Phi, A> / t) I) D with A = DD', t = tr A, Phi = A / t - I / d; scaled by weight / d."""
    view = toy_view()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        view.sae.W_dec_FD.copy_(torch.randn(48, 12, generator=draw))
    FrameEnergy(weight=0.3).value(view).backward()
    d_DA = view.sae.W_dec_FD.detach()[16:].double().T
    a_DD, eye = d_DA @ d_DA.T, torch.eye(12, dtype=torch.float64)
    t = a_DD.trace()
    phi = a_DD / t - eye / 12
    wanted = 0.3 / 12 * 4 / t * (phi - (phi * a_DD).sum() / t * eye) @ d_DA
    found = view.sae.W_dec_FD.grad
    assert found is not None
    assert not bool(found[:16].any())
    assert torch.allclose(found[16:].T.double(), wanted, rtol=1e-3, atol=1e-7)


def test_frame_energy_names_the_strata_it_does_not_find() -> None:
    with pytest.raises(RunError, match="anchored, free"):
        FrameEnergy(stratum="fre").value(toy_view())
