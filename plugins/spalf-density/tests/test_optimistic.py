"""Dual `optimistic`: the slot's checks, one step by hand, and the range of rates that its docstring states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spalf_density import Optimistic
from spalf_density.optimistic import OptimisticState

from spalf.testing import conform, signal


@pytest.mark.parametrize("check", conform(Optimistic))
def test_conforms(check: Any) -> None:
    check()


def test_one_step_by_hand() -> None:
    state = OptimisticState(lam_M=torch.tensor([1.0, 1.0, 9.9]))
    seen = signal([0.5, -2.0, 4.0], previous=[1.0, 0.0, 4.0])
    moved = Optimistic(rate=0.5, limit=10.0).step(state, seen)
    # 1 + 0.5 (2 * 0.5 - 1) = 1;  1 + 0.5 (-4) < 0;  9.9 + 0.5 * 4 > 10
    torch.testing.assert_close(moved.lam_M, torch.tensor([1.0, 0.0, 10.0]))


def error_after(steps: int, rate: float, s: float) -> float:
    """How far from its fixed point 10 the multiplier is, on v = s (10 - lam)."""
    law, state, before = Optimistic(rate=rate), OptimisticState(lam_M=torch.tensor([9.0])), [s]
    for _ in range(steps):
        v = (s * (10.0 - state.lam_M)).tolist()
        state, before = law.step(state, signal(v, previous=before)), v
    return abs(float(state.lam_M) - 10.0)


@pytest.mark.parametrize("s", [0.25, 1.0, 3.0])
def test_the_range_of_stable_rates(s: float) -> None:
    assert error_after(400, 0.97 * 2 / (3 * s), s) < 1e-3
    assert error_after(400, 1.03 * 2 / (3 * s), s) > 1.0
    fastest = error_after(20, 1 / (2 * s), s)
    assert fastest < error_after(20, 0.7 / (2 * s), s)
    assert fastest < error_after(20, 1.2 / (2 * s), s)
