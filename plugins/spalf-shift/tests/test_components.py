"""Every component: the checks of its slot, and what its docstring states."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from spalf_shift.activation import SoftThreshold
from spalf_shift.constraint import CodeLevel
from spalf_shift.dual import Cooper, CooperState
from spalf_shift.evaluator import ConceptMcc, ConceptProbe, SteeringAccuracy
from spalf_shift.phase import CooperPhase
from spalf_shift.source import Endpoints
from spalf_shift.whitener import ShiftScale

from spalf import Facts, Raw, RunError, write_pairs
from spalf.testing import conform, signal

from .conftest import planted

SCRATCH = Path(tempfile.mkdtemp(prefix="spalf-shift-"))
LANGUAGE = str(write_pairs(SCRATCH / "language", planted(groups=60, d_model=192)))
"""As wide as the kit's language model."""
SMALL = str(write_pairs(SCRATCH / "small", planted()))
CHECKS = [
    *conform(SoftThreshold),
    *conform(ShiftScale),
    *conform(CodeLevel, level=0.02),
    *conform(Cooper),
    *conform(CooperPhase),
    *conform(CooperPhase, scheme="simultaneous"),
    *conform(Endpoints, pairs=SMALL, held_out=0.25),
    *conform(ConceptMcc, pairs=LANGUAGE),
    *conform(ConceptProbe, pairs=LANGUAGE, ks=(1, 5)),
    *conform(SteeringAccuracy, pairs=LANGUAGE),
]


@pytest.mark.parametrize("check", CHECKS)
def test_conforms(check: Any) -> None:
    check()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------- activation
def activator(**options: Any) -> Any:
    made: Any = SoftThreshold(**options).build(3)
    if options.get("learned", True):
        made.log_threshold_F.data.copy_(torch.tensor([0.5, 1.0, 2.0]).log())
    return made


def test_soft_threshold_by_hand() -> None:
    pre_BF = torch.tensor([[0.7, -3.0, 1.0], [-0.5, 1.5, -2.5]])
    z_BF, gate_BF = activator()(pre_BF)
    torch.testing.assert_close(z_BF, torch.tensor([[0.2, -2.0, 0.0], [0.0, 0.5, -0.5]]))
    assert torch.equal(gate_BF, torch.tensor([[1.0, 1, 0], [0, 1, 1]]))


def test_soft_threshold_is_odd() -> None:
    pre_BF = normal(50, 3)
    ours, mirrored = activator()(pre_BF), activator()(-pre_BF)
    assert torch.equal(ours[0], -mirrored[0])
    assert torch.equal(ours[1], mirrored[1])


def test_gradient_of_z_is_its_own() -> None:
    pre_BF = normal(40, 3).double().requires_grad_()
    log_F = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).log().requires_grad_()

    def z(pre_BF: torch.Tensor, log_F: torch.Tensor) -> torch.Tensor:
        made = activator().double()
        del made.log_threshold_F
        made.log_threshold_F = log_F
        out: torch.Tensor = made(pre_BF)[0]
        return out

    assert torch.autograd.gradcheck(z, (pre_BF, log_F))


def test_the_gates_gradient_is_a_window() -> None:
    made = activator()
    made.bandwidth_F.fill_(0.4)
    pre_BF = torch.tensor([[0.6, -1.1, 5.0], [0.0, -0.9, -2.1]])
    made(pre_BF)[1].sum().backward()
    # -theta / eps for every entry within eps / 2 of the threshold, on either side of zero
    torch.testing.assert_close(made.log_threshold_F.grad, torch.tensor([-0.5 / 0.4, -2 * 1.0 / 0.4, -2.0 / 0.4]))


def test_layer_norm_takes_the_length_away() -> None:
    pre_BF = 30.0 * normal(20, 3)  # large against the norm's epsilon
    for made in (activator(layer_norm=True), activator(layer_norm=True, learned=False)):
        torch.testing.assert_close(made(2 * pre_BF)[0], made(pre_BF)[0], rtol=1e-3, atol=1e-4)
    plain = activator(learned=False)
    assert torch.equal(plain(2 * pre_BF)[0], 2 * plain(pre_BF)[0])


def test_layer_norm_over_one_feature_is_constant() -> None:
    one: Any = SoftThreshold(layer_norm=True, learned=False).build(1)
    assert torch.equal(one(normal(9, 1))[0], torch.zeros(9, 1))


# ------------------------------------------------------------------------------------------------------- whitener
def fitted(component: ShiftScale, x_BD: torch.Tensor) -> Any:
    metric: Any = component.build(Facts(d_model=x_BD.shape[1]))
    x_BD = x_BD.double()
    component.fit_(metric, x_BD.mean(0), torch.cov(x_BD.T, correction=0))
    return metric


def test_one_scale_keeps_length_and_the_common_shift() -> None:
    x_BD = 5.0 * normal(400, 6) + torch.tensor([8.0, 0, 0, 0, 0, 0])
    metric = fitted(ShiftScale(), x_BD)
    white_BD = metric.white(Raw(x_BD))
    torch.testing.assert_close(white_BD.square().mean(), torch.tensor(1.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(metric.white(Raw(2 * x_BD)), 2 * white_BD)
    assert float(white_BD.mean(0)[0]) > 1.0, "the shift that all pairs share is the concept: it stays"
    assert 0.2 < metric.report()["common_shift"] < 0.4  # 64 of 64 + 150


def test_layer_norm_loses_the_length() -> None:
    x_BD = 30.0 * normal(50, 6)
    metric = fitted(ShiftScale(layer_norm=True), x_BD)
    torch.testing.assert_close(metric.white(Raw(2 * x_BD)), metric.white(Raw(x_BD)), rtol=1e-3, atol=1e-4)


def test_a_shift_common_to_all_pairs_is_enough() -> None:
    metric = fitted(ShiftScale(), torch.ones(10, 6))
    torch.testing.assert_close(metric.white(Raw(torch.ones(1, 6))), torch.ones(1, 6), check_dtype=False)
    with pytest.raises(RunError, match="no shift to learn"):
        fitted(ShiftScale(), torch.zeros(10, 6))


# ------------------------------------------------------------------------------------------------------------ dual
def test_cooper_is_projected_ascent_from_the_margin_on() -> None:
    state = Cooper(rate=0.5, margin=0.1, limit=2.0).init(4)
    state = CooperState(lam_M=torch.tensor([0.0, 1.0, 1.0, 1.9]), smooth_M=state.smooth_M, started_M=state.started_M)
    moved = Cooper(rate=0.5, margin=0.1, limit=2.0).step(state, signal([-1.0, -0.1, 0.9, 5.0]))
    torch.testing.assert_close(moved.lam_M, torch.tensor([0.0, 1.0, 1.5, 2.0]))


def test_nupi_by_hand() -> None:
    law = Cooper(rate=0.1, kp=2.0, nu=0.5)
    state = law.step(law.init(1), signal([1.0]))
    torch.testing.assert_close(state.lam_M, torch.tensor([0.1]))  # s starts at v: no kick
    state = law.step(state, signal([2.0]))
    torch.testing.assert_close(state.lam_M, torch.tensor([0.1 + 0.1 * (2.0 + 2.0 * 0.5 * (2.0 - 1.0))]))
    torch.testing.assert_close(state.smooth_M, torch.tensor([1.5]))


def test_an_off_constraint_is_left_alone() -> None:
    law = Cooper()
    state = law.step(law.init(2), signal([1.0, 1.0], on=[True, False]))
    assert state.lam_M.tolist()[1] == 0.0
    assert state.started_M.tolist() == [True, False]
