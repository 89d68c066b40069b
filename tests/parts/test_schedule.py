"""Schedules: the kit's checks, and the courses that each documents."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spalf.core.recipe import Plan
from spalf.core.slots import label
from spalf.core.values import Clock
from spalf.parts import schedule as module
from spalf.parts.schedule import Constant, Cosine, InverseSqrt, Linear, warmup_steps
from spalf.testing import conform

SCHEDULES = [cls for cls in vars(module).values() if isinstance(cls, type) and "__spalf__" in vars(cls)]
CHECKS = [pytest.param(check, id=f"{label(cls).use}-{check.__name__}") for cls in SCHEDULES for check in conform(cls)]


@pytest.mark.parametrize("check", CHECKS)
def test_conforms(check: Any) -> None:
    check()


def test_all_are_here() -> None:
    assert {label(cls).use for cls in SCHEDULES} == {"linear", "cosine", "constant", "inverse_sqrt"}


def plan(total: int) -> Plan:
    """As much of a plan as a schedule asks for."""
    return cast(Plan, SimpleNamespace(total_steps=total))


def course(schedule: Any, *steps: int, total: int = 1000, entered: int = 0) -> list[float]:
    return [schedule.scale(Clock(step=s, total=total, entered=entered)) for s in steps]


def test_linear() -> None:
    seen = course(Linear(warmup=100), 0, 49, 99, 799, 800, 900, 1000)
    assert seen == pytest.approx([0.01, 0.5, 1.0, 1.0, 1.0, 0.55, 0.1])


def test_without_decay_the_rate_stays() -> None:
    assert course(Linear(warmup=1, decay=0.0), 1000) == [1.0]


def test_cosine() -> None:
    """Half of the way down is half of the way there: 100 + 900 / 2 = 550."""
    seen = course(Cosine(warmup=100, final=0.2), 0, 49, 99, 100, 325, 550, 1000)
    quarter = 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2
    assert seen == pytest.approx([0.01, 0.5, 1.0, 1.0, quarter, 0.6, 0.2])


def test_constant() -> None:
    assert course(Constant(), 0, 1, 500, 1000) == [1.0, 1.0, 1.0, 1.0]
    assert course(Constant(warmup=4), 0, 1, 2, 3, 4) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_inverse_sqrt() -> None:
    assert course(InverseSqrt(warmup=100), 49, 99, 399, 899) == pytest.approx([0.5, 1.0, 0.5, 1 / 3])
    # a run that is prolonged keeps the course that it had
    settled = InverseSqrt().settle(plan(1000))
    assert course(settled, 10, 300, 999) == course(settled, 10, 300, 999, total=10_000)


@pytest.mark.parametrize("schedule", [Linear(warmup=100, decay=0.0), Constant(warmup=100)])
def test_a_later_phase_warms_up_again(schedule: Any) -> None:
    assert course(schedule, 900, 914, 929, 930, 999, entered=900) == pytest.approx([1 / 30, 0.5, 1.0, 1.0, 1.0])
    assert course(schedule, 549, entered=500) == pytest.approx([0.5])


@given(
    warmup=st.integers(0, 500),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
    total=st.integers(1, 10**6),
    share=st.floats(0, 1),
)
def test_linear_stays_in_bounds(warmup: int, decay: float, final: float, total: int, share: float) -> None:
    schedule = Linear(warmup=warmup, decay=decay, final=final)
    assert 0 <= schedule.scale(Clock(step=int(share * total), total=total)) <= 1
    assert schedule.scale(Clock(step=total, total=total)) <= (1.0 if decay == 0 else final) + 1e-9


@given(final=st.floats(0, 1), total=st.integers(1, 10**5), share=st.floats(0, 1))
def test_cosine_falls_from_the_peak_to_its_end(final: float, total: int, share: float) -> None:
    schedule = Cosine(warmup=1, final=final)
    step = int(share * total)
    now, then = course(schedule, step, min(total, step + 1), total=total)
    assert final - 1e-9 <= then <= now + 1e-9 <= 1 + 2e-9


@pytest.mark.parametrize(
    ("total", "steps"), [(1, 1), (100, 20), (1000, 200), (20_000, 400), (50_000, 1000), (10**6, 1000)]
)
def test_warmup_steps(total: int, steps: int) -> None:
    assert warmup_steps(total) == steps
    for schedule in (Linear(), Cosine(), InverseSqrt()):
        settled = schedule.settle(plan(total))
        assert settled.warmup == steps
        assert {row.path: row.value for row in settled.derive(plan(total))}["warmup"] == steps


def test_derived_rows() -> None:
    rows = {row.path: row for row in Linear(warmup=7, decay=0.2).derive(plan(1000))}
    assert rows["decay_start"].value == 800
    assert (rows["warmup"].value, rows["warmup"].formula, rows["warmup"].origin) == (7, "as given", "schedule.warmup")


@pytest.mark.parametrize(("cls", "bad"), [(Linear, {"decay": 1.5}), (Linear, {"warmup": -1}), (Cosine, {"final": 2.0})])
def test_options_are_checked(cls: type, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        cls(**bad)
