"""Refined coefficients: less error on the same support, right gradients, and what cannot follow them says so."""

from __future__ import annotations

from typing import Any, cast

import torch

from spalf.core.values import White
from spalf.engine import frontier
from spalf.kernels.reference import ReferenceOps
from spalf.parts.activation import JumpReLU
from spalf.parts.kernel import TorchOps
from spalf.testing.toy import toy_view

REFINES = JumpReLU(bandwidth=0.5, refine=True)


def refining(ops: Any = None, step: float = 0.25) -> Any:
    view = toy_view(activation=REFINES, ops=ops or ReferenceOps())
    cast(Any, view.sae).measure_by(view.metric)
    cast(Any, view.sae.activator).step_F.data.fill_(step)
    return view


def test_a_step_of_zero_changes_nothing() -> None:
    view = refining(step=0.0)
    plain = toy_view(activation=JumpReLU(bandwidth=0.5))
    white_BD = view.forward.white_BD
    torch.testing.assert_close(view.sae.encode(white_BD).z_BK, plain.sae.encode(white_BD).z_BK)


@torch.no_grad()
def test_the_same_features_are_on_and_leave_less_error_in_model_space() -> None:
    before, after = refining(step=0.0), refining()
    white_BD = before.forward.white_BD
    codes = [view.sae.encode(white_BD) for view in (before, after)]
    assert torch.equal(codes[0].gate_BK, codes[1].gate_BK)
    assert bool((codes[1].z_BK[codes[1].gate_BK == 0] == 0).all())
    assert bool((codes[1].z_BK >= 0).all())
    errors = [
        float(view.metric.raw_square(White(white_BD - view.sae.decode(code))))
        for view, code in zip((before, after), codes, strict=True)
    ]
    assert errors[1] < 0.95 * errors[0]


@torch.no_grad()
def test_one_step_is_a_descent_step_of_the_error_in_model_space() -> None:
    """Along the gradient at z, with the form's scale: the change of each coefficient, computed by autograd."""
    view = refining(step=1e-3)
    white_BD, sae = view.forward.white_BD, view.sae
    cast(Any, sae.activator).step_F.data.zero_()
    plain = sae.encode(white_BD)
    with torch.enable_grad():
        z_BF = plain.z_BK.clone().requires_grad_(True)
        hat_BD = sae.log_gain.exp() * z_BF @ sae.W_dec_FD + sae.b_dec_D
        (slope_BF,) = torch.autograd.grad(view.metric.raw_square(White(white_BD - hat_BD)), z_BF)
    cast(Any, sae.activator).step_F.data.fill_(1e-3)
    unit_DD = torch.eye(white_BD.shape[1])
    scale = view.metric.raw_direction(view.metric.raw_direction(White(unit_DD))).diagonal().mean()
    # gradient of |e|^2 = -2 gain <e A, w>, and the step divides by the gain
    wanted_BF = plain.z_BK - 1e-3 * slope_BF / (2 * scale * sae.log_gain.exp() ** 2)
    moved_BF = sae.encode(white_BD).z_BK
    on = plain.gate_BK > 0
    torch.testing.assert_close(moved_BF[on], wanted_BF[on].clamp(min=0), rtol=1e-4, atol=1e-5)


def test_compact_and_dense_codes_have_the_same_gradients() -> None:
    found = []
    for ops in (ReferenceOps(), TorchOps(code="compact")):
        view = refining(ops)
        code = view.sae.encode(view.forward.white_BD)
        error = (view.forward.white_BD - view.sae.decode(code)).square().sum() + code.l0_B().sum()
        error.backward()
        found.append({name: p.grad for name, p in view.sae.named_parameters()})
    assert found[0]["_activator.step_F"] is not None
    for name, grad in found[0].items():
        if grad is None:
            assert found[1][name] is None
            continue
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()))


def test_an_entry_in_the_window_that_is_off_keeps_its_gradient() -> None:
    """At a step of 0 thresholds have the plain gradient, to which entries just below them add their share."""
    found = []
    for view in (refining(step=0.0), toy_view(activation=JumpReLU(bandwidth=0.5))):
        z_BK = view.sae.encode(view.forward.white_BD).z_BK
        weight_BK = torch.randn(z_BK.shape, generator=torch.Generator().manual_seed(0))
        found += torch.autograd.grad((z_BK * weight_BK).sum(), cast(Any, view.sae.activator).log_threshold_F)
    assert bool((found[1] != 0).any())
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_the_frontier_at_scale_1_is_the_trained_code() -> None:
    view = refining()
    state: Any = type("State", (), {"sae": view.sae, "metric": view.metric})
    white_BD = view.forward.white_BD
    torch.testing.assert_close(
        frontier.rescaled(state, white_BD, 1.0).z_BK, view.sae.encode(white_BD, dense=True).z_BK, rtol=1e-5, atol=1e-6
    )
