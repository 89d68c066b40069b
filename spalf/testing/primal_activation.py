"""Conformance of activations: their code, its gradient, and what they say about inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from spalf.core.built import Activator
from spalf.testing.primal import Check, close
from spalf.testing.primal_linear import bind


def _activator(component: Any, width: int = 24, rows: int = 400) -> tuple[Activator, Tensor]:
    """An activator calibrated to a density of 0.1 on its pre-activations [rows, width], float64, at inference."""
    draw = torch.Generator().manual_seed(5)
    pre_BF = torch.randn(rows, width, generator=draw, dtype=torch.float64) * torch.linspace(0.5, 2, width)
    activator: Activator = component.build(width)
    module = cast(nn.Module, activator).double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(0.05 * (i + 1))  # no bias or scale that is left at its start
    activator.calibrate_(pre_BF, 0.1, slice(0, width))
    return activator, pre_BF


def _backward(activator: Activator, pre: Tensor, index: Tensor | None, out: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Gradients at the parameters and at `pre` of sum(out(pre) * (z + gate))."""
    leaf = pre.clone().requires_grad_(True)
    z, gate = activator(leaf, index)
    weight = out(pre)
    parameters = list(cast(nn.Module, activator).parameters())
    grads = torch.autograd.grad((weight * (z + gate)).sum(), [leaf, *parameters], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, [leaf, *parameters], strict=True)]


def _state(activator: Activator) -> dict[str, Tensor]:
    """A copy of what a checkpoint holds of it."""
    return {k: v.clone() for k, v in cast(nn.Module, activator).state_dict().items()}


def gate_is_zero_or_one_and_z_is_zero_where_the_gate_is(component: Any) -> None:
    for training in (False, True):
        activator, pre_BF = _activator(component)
        cast(nn.Module, activator).train(training)
        z_BF, gate_BF = activator(pre_BF)
        assert bool(((gate_BF == 0) | (gate_BF == 1)).all())
        assert bool((z_BF[gate_BF == 0] == 0).all())
        assert bool((z_BF[gate_BF == 1] > 0).all() if not activator.signed else z_BF[gate_BF == 1].all())


def calibration_gives_the_density(component: Any) -> None:
    activator, pre_BF = _activator(component)
    if not _state(activator) and not activator.k:
        return  # nothing to calibrate
    wanted = activator.k / pre_BF.shape[1] if activator.k else 0.1
    gate_BF = activator(pre_BF)[1]
    close(gate_BF.mean().detach(), torch.tensor(wanted, dtype=gate_BF.dtype), "share of active entries", 0.05)


def a_pass_changes_no_state(component: Any) -> None:
    for training in (False, True):
        activator, pre_BF = _activator(component)
        cast(nn.Module, activator).train(training)
        before = _state(activator)
        activator(pre_BF)
        for name, value in _state(activator).items():
            assert torch.equal(value, before[name]), f"a pass, training {training}, has changed {name}"


def at_inference_a_row_is_its_own(component: Any) -> None:
    activator, pre_BF = _activator(component)
    for ours, alone in zip(activator(pre_BF[:7]), activator(pre_BF), strict=True):
        assert torch.equal(ours, alone[:7]), "a row's code depends on the rows beside it"


def thresholds_and_slopes_say_what_inference_does(component: Any) -> None:
    activator, pre_BF = _activator(component)
    z_BF, gate_BF = (x.detach() for x in activator(pre_BF))
    above_BF = pre_BF > activator.threshold_F().detach()
    affine = activator.affine_F()
    slope_F, shift_F = (x.detach() for x in affine) if affine else (torch.ones(()), torch.zeros(()))
    wanted_BF = torch.where(above_BF, slope_F * pre_BF + shift_F, 0.0)
    if activator.k:
        wanted_BF = wanted_BF * (pre_BF >= pre_BF.topk(activator.k, dim=1).values[:, -1:])
    keep_BF = pre_BF > 0 if activator.signed else torch.ones_like(above_BF)
    close(z_BF * keep_BF, wanted_BF * keep_BF, "z from threshold_F, affine_F and k", 1e-9)
    assert bool((gate_BF[wanted_BF > 0] == 1).all())


def below_reach_is_neither_value_nor_gradient(component: Any) -> None:
    activator, pre_BF = _activator(component)
    reach_F = activator.reach_F()
    if reach_F is None:
        return
    low_BF = torch.minimum(pre_BF, reach_F)
    z_BF, gate_BF = activator(low_BF)
    assert not bool(z_BF.any()), "an entry at or below reach has a value"
    assert not bool(gate_BF.any()), "an entry at or below reach is active"
    for gradient in _backward(activator, low_BF, None, torch.ones_like):
        assert not bool(gradient.any()), "an entry at or below reach has a gradient"


def a_list_equals_the_dense_code(component: Any) -> None:
    activator, pre_BF = _activator(component)
    reach_F = activator.reach_F()
    if reach_F is None:
        return
    width = pre_BF.shape[1]
    on_BF = pre_BF > reach_F
    index_BK = torch.where(on_BF, torch.arange(width), width).sort(dim=1).values[:, : int(on_BF.sum(1).max())]
    padded_BF = torch.cat([pre_BF, torch.zeros(len(pre_BF), 1, dtype=pre_BF.dtype)], dim=1)
    pre_BK = padded_BF.gather(1, index_BK)
    for listed, dense in zip(activator(pre_BK, index_BK), activator(pre_BF), strict=True):
        back_BF = padded_BF.new_zeros(padded_BF.shape).scatter_add(1, index_BK, listed.detach())
        assert not bool(back_BF[:, width].any()), "padding has a value"
        close(back_BF[:, :width], dense, "listed values", 1e-12)
    ours, theirs = (_backward(activator, p, i, torch.cos) for p, i in ((pre_BK, index_BK), (pre_BF, None)))
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        close(a, b, "gradient of a parameter from a list", 1e-9)
    assert not bool(ours[0][index_BK == width].any()), "padding has a gradient"


ACTIVATION = (
    gate_is_zero_or_one_and_z_is_zero_where_the_gate_is,
    calibration_gives_the_density,
    a_pass_changes_no_state,
    at_inference_a_row_is_its_own,
    thresholds_and_slopes_say_what_inference_does,
    below_reach_is_neither_value_nor_gradient,
    a_list_equals_the_dense_code,
)


def checks(component: Any) -> list[Check]:
    """What an activation must do, in training and at inference."""
    return [bind(test, component) for test in ACTIVATION]
