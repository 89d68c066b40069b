"""Filters: conformance, and the running means in closed form."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spalf.core.slots import label
from spalf.parts import filter as module
from spalf.parts.filter import DualRateEma, Identity
from spalf.testing import conform

FILTERS = [cls for cls in vars(module).values() if isinstance(cls, type) and "__spalf__" in vars(cls)]
CHECKS = [pytest.param(check, id=f"{label(cls).use}-{check.__name__}") for cls in FILTERS for check in conform(cls)]
ON = torch.ones(1, dtype=torch.bool)


@pytest.mark.parametrize("check", CHECKS)
def test_conforms(check: Any) -> None:
    check()


def test_both_are_here() -> None:
    assert {label(cls).use for cls in FILTERS} == {"dual_rate_ema", "identity"}


@given(
    g=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30),
    fast=st.floats(0, 0.99),
    slow=st.floats(0, 0.999),
)
def test_running_means(g: list[float], fast: float, slow: float) -> None:
    filter = DualRateEma(fast=fast, slow=slow)
    state = filter.enter(filter.init(1), torch.tensor([g[0]]), ON)
    wanted = {"fast_M": g[0], "slow_M": g[0]}
    for value in g:
        state = filter.step(state, torch.tensor([value]), ON)
        for name, beta in (("fast_M", fast), ("slow_M", slow)):
            wanted[name] = beta * wanted[name] + (1 - beta) * value
            assert float(getattr(state, name)) == pytest.approx(wanted[name], rel=1e-4, abs=1e-3)


def test_the_first_violation_is_not_diluted() -> None:
    """Started at 0, the slow mean would report a hundredth of the truth after one step."""
    filter, g_M = DualRateEma(), torch.tensor([5.0])
    seen = filter.signal(filter.step(filter.enter(filter.init(1), g_M, ON), g_M, ON), g_M, ON)
    assert float(seen.slow_M) == float(seen.fast_M) == float(seen.previous_M) == 5.0


def test_identity_passes_violations_on() -> None:
    filter = Identity()
    state = filter.step(filter.enter(filter.init(1), torch.tensor([5.0]), ON), torch.tensor([-2.0]), ON)
    seen = filter.signal(state, torch.tensor([-2.0]), ON)
    assert float(seen.fast_M) == float(seen.slow_M) == -2.0
    assert float(seen.previous_M) == 5.0


@pytest.mark.parametrize("options", [{"fast": 1.0}, {"slow": -0.1}, {"every": 0}])
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        DualRateEma(**options)
