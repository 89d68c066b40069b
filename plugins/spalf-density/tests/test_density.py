"""Constraint `density`: the slot's checks, its value worked out by hand, and where its gradient goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spalf_density import Density
from spalf_density.density import frequency_F
from torch import Tensor

from spalf import Code, Forward, View, White
from spalf.testing import conform

GATE_BF = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).float()
"""Four tokens, four features: they fire on 3/4, 1/2, 0 and 1/4 of the tokens."""
FITS = torch.zeros((), dtype=torch.bool)


@pytest.mark.parametrize("check", conform(Density))
def test_conforms(check: Any) -> None:
    check()


def dense(gate_BF: Tensor) -> Code:
    return Code(
        pre_BK=gate_BF,
        gate_BK=gate_BF,
        z_BK=gate_BF,
        index_BK=None,
        width=4,
        overflow=FITS,
    )


def compact(gate_BF: Tensor) -> Code:
    """The same code as a list, in another order, without the feature that never fires, padded with one entry."""
    order = torch.tensor([3, 0, 1])
    gate_BK = torch.nn.functional.pad(gate_BF[:, order], (0, 1))
    index_BK = torch.nn.functional.pad(order.repeat(4, 1), (0, 1), value=4)
    return Code(
        pre_BK=gate_BK,
        gate_BK=gate_BK,
        z_BK=gate_BK,
        index_BK=index_BK,
        width=4,
        overflow=FITS,
    )


def view_of(code: Code) -> View:
    x_BD = White(torch.zeros(code.gate_BK.shape[0], 2))
    absent: Any = None
    return View(
        batch=absent,
        forward=Forward(white_BD=x_BD, code=code, white_hat_BD=x_BD),
        sae=absent,
        metric=absent,
        anchors={},
        stream=absent,
        clock=absent,
        draw=absent,
        reconstruct=absent,
        silent_F=absent,
    )


@pytest.mark.parametrize("form", [dense, compact])
def test_frequency(form: Any) -> None:
    torch.testing.assert_close(frequency_F(form(GATE_BF)), torch.tensor([0.75, 0.5, 0.0, 0.25]))


@pytest.mark.parametrize("form", [dense, compact])
def test_value_and_budget(form: Any) -> None:
    part, view = Density(target=8, cap=0.3, share=0.25), view_of(form(GATE_BF))
    torch.testing.assert_close(part.value(view), torch.tensor(0.45 + 0.2))  # (3/4 - 0.3) + (1/2 - 0.3)
    torch.testing.assert_close(part.budget(view), torch.tensor(2.0))  # 0.25 * 8


@pytest.mark.parametrize("form", [dense, compact])
def test_gradient_goes_to_features_above_the_cap(form: Any) -> None:
    gate_BF = GATE_BF.clone().requires_grad_()
    Density(target=8, cap=0.3).value(view_of(form(gate_BF))).backward()
    expected_BF = torch.tensor([0.25, 0.25, 0.0, 0.0]).expand(4, 4)  # 1 / B for features 0 and 1
    torch.testing.assert_close(gate_BF.grad, expected_BF)


def test_firing_elsewhere_does_not_help() -> None:
    part = Density(target=8, cap=0.3)
    more_BF = GATE_BF.clone()
    more_BF[3, 2] = 1.0  # a rare feature fires once more, below the cap
    torch.testing.assert_close(part.value(view_of(dense(more_BF))), part.value(view_of(dense(GATE_BF))))
