"""Penalties: conformance, bounds and steps of CAPU, and what the published form does instead."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spalf.core.slots import label
from spalf.parts import penalty as module
from spalf.parts.filter import DualRateEma, Identity
from spalf.parts.penalty import Capu, CapuMonotone, Constant
from spalf.testing import conform, signal
from spalf.testing.control import control_plan

PENALTIES = [cls for cls in vars(module).values() if isinstance(cls, type) and "__spalf__" in vars(cls)]
CHECKS = [pytest.param(check, id=f"{label(cls).use}-{check.__name__}") for cls in PENALTIES for check in conform(cls)]
ENTERING = torch.ones(1, dtype=torch.bool)


@pytest.mark.parametrize("check", CHECKS)
def test_conforms(check: Any) -> None:
    check()


def test_all_three_are_here() -> None:
    assert {label(cls).use for cls in PENALTIES} == {"constant", "capu", "capu_monotone"}


def run(penalty: Any, violations: list[float]) -> list[float]:
    """rho after each tick."""
    state, before = penalty.enter(penalty.init(1), torch.tensor(violations[:1]), ENTERING), violations[0]
    out = []
    for v in violations:
        state = penalty.step(state, signal([v], previous=[before], rho=state.rho_M))
        before = v
        out.append(float(state.rho_M))
    return out


def test_constant_is_constant() -> None:
    assert run(Constant(rho=0.7), [1.0, -3.0, 100.0]) == pytest.approx([0.7] * 3)


@given(v_T=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=60), memory=st.floats(0.0, 0.99))
def test_capu_keeps_its_bounds(v_T: list[float], memory: float) -> None:
    rho = run(Capu(memory=memory, start=2.0, every=1), v_T)
    assert all(0.1 * 2.0 * 0.999 <= r <= 10 * 2.0 * 1.001 for r in rho)
    assert all(0.499 <= b / a <= 2.001 for a, b in zip([2.0, *rho], rho, strict=False))


def test_capu_follows_the_violation_both_ways() -> None:
    """rho = scale / rms(v) once the mean square has forgotten its start; not the published, monotone rule."""
    rho = run(Capu(memory=0.9, every=1), [0.5] * 200 + [4.0] * 200)
    assert rho[199] == pytest.approx(2.0, rel=1e-3)
    assert rho[-1] == pytest.approx(0.25, rel=1e-3)
    assert run(Capu(memory=0.9, every=1), [1e-3] * 300)[-1] == pytest.approx(10.0)
    assert run(Capu(memory=0.9, every=1), [1e3] * 300)[-1] == pytest.approx(0.1)


def test_capu_moves_once_per_slow_memory() -> None:
    rho = run(Capu(memory=0.5, every=10), [0.1] * 40)
    assert rho[:9] == [1.0] * 9
    assert rho[9] == 2.0
    assert len(set(rho)) == 5


@pytest.mark.parametrize(
    ("filter", "ticks"),
    [
        (DualRateEma(every=1), 100),
        (DualRateEma(every=10), 10),
        (DualRateEma(every=100), 1),
        (DualRateEma(every=300), 1),
        (Identity(every=1), 1),
    ],
)
def test_capu_takes_its_clock_from_the_filter(filter: Any, ticks: int) -> None:
    settled = Capu().settle(control_plan(filter))
    assert settled.every == ticks
    assert {row.path: row.value for row in settled.derive(control_plan(filter))}["penalty.every"] == ticks
    assert Capu(every=7).settle(control_plan(filter)).every == 7


@given(v_T=st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=60))
def test_published_form_never_falls(v_T: list[float]) -> None:
    rho = run(CapuMonotone(memory=0.5), v_T)
    assert all(b >= a for a, b in zip([1.0, *rho], rho, strict=False))
    assert max(rho) <= 10.0


def test_published_form_waits_for_a_stall() -> None:
    falling = [0.9**t for t in range(100)]
    assert run(CapuMonotone(memory=0.5), falling)[-1] == pytest.approx(1.0, abs=0.2)
    assert run(CapuMonotone(memory=0.5), [-0.01] * 100)[-1] == 1.0
    assert run(CapuMonotone(memory=0.5), [0.25] * 100)[-1] == pytest.approx(4.0, rel=1e-3)
