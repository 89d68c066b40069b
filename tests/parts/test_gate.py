"""Gates: conformance, and the schedule that each documents."""

from typing import Any

import pytest
import torch

from spalf.core.slots import label
from spalf.core.values import Clock
from spalf.parts import gate as module
from spalf.parts.gate import Exhausted, Feasible
from spalf.testing import conform, signal

GATES = [cls for cls in vars(module).values() if isinstance(cls, type) and "__spalf__" in vars(cls)]
CHECKS = [pytest.param(check, id=f"{label(cls).use}-{check.__name__}") for cls in GATES for check in conform(cls)]
TOTAL = 1000


@pytest.mark.parametrize("check", CHECKS)
def test_conforms(check: Any) -> None:
    check()


def test_both_are_here() -> None:
    assert {label(cls).use for cls in GATES} == {"feasible", "exhausted"}


def opens_at(gate: Any, violation: Any, on: list[bool] | None = None) -> int | None:
    """The first step at which the gate is open, when `violation(step)` is what two constraints show."""
    state = gate.init()
    for step in range(TOTAL + 1):
        clock = Clock(step=step, total=TOTAL)
        state = gate.step(state, signal(violation(step), on=on), clock)
        if gate.open(state, clock):
            return step
    return None


def test_feasible_from_the_start_waits_for_the_clock() -> None:
    assert opens_at(Feasible(leave=0), lambda t: [-1.0, -1.0]) == 950


def test_never_feasible_opens_at_the_fallback() -> None:
    assert opens_at(Feasible(leave=0), lambda t: [-1.0, 1.0]) == 970


def test_a_short_run_leaves_steps_for_the_phase_that_follows() -> None:
    assert opens_at(Feasible(), lambda t: [-1.0, 1.0]) == 900
    assert opens_at(Feasible(leave=50), lambda t: [-1.0, 1.0]) == 950
    long = Clock(step=95_999, total=100_000)
    assert not Feasible().open(Feasible().init(), long)
    assert Feasible().open(Feasible().init(), Clock(step=97_000, total=100_000))


def test_patience_counts_consecutive_steps_of_all_constraints() -> None:
    gate = Feasible(patience=100, earliest=0.5, latest=1.0, leave=0)
    assert opens_at(gate, lambda t: [-1.0, -1.0 if t >= 600 else 1.0]) == 699
    assert opens_at(gate, lambda t: [-1.0, 1.0 if t % 100 == 0 else -1.0]) == TOTAL
    assert opens_at(gate, lambda t: [-1.0, 0.0]) == TOTAL


def test_constraints_that_are_off_have_no_say() -> None:
    gate = Feasible(patience=10, earliest=0.5, latest=1.0)
    assert opens_at(gate, lambda t: [-1.0, 1.0], on=[True, False]) == 500


def test_exhausted_opens_at_the_end() -> None:
    assert opens_at(Exhausted(), lambda t: [-1.0, -1.0]) == TOTAL


def test_order_of_the_schedule() -> None:
    with pytest.raises(ValueError, match="before earliest"):
        Feasible(earliest=0.9, latest=0.5)


def test_the_count_is_a_tensor() -> None:
    state = Feasible().step(Feasible().init(), signal([-1.0]), Clock(step=0, total=10))
    assert isinstance(state.count, torch.Tensor)
    assert isinstance(state.opened, torch.Tensor)
