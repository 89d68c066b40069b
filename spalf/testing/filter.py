"""What every filter must do. M constraints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spalf.core import tree
from spalf.testing import Check
from spalf.testing.control import is_pure, same

M = 4
ON = torch.ones(M, dtype=torch.bool)
G = torch.tensor([-1.0, 0.0, 0.3, 1e3])
"""First violations: satisfied, at the budget, violated, far out."""


def filter_checks(filter: Any) -> list[Check]:
    """The checks of one filter."""
    return _values(filter) + _rows(filter) + _contract(filter)


def _entered(filter: Any) -> Any:
    return filter.enter(filter.init(M), G, ON)


def _run(filter: Any, state: Any, at_M: Tensor, steps: int, mask_M: Tensor = ON) -> Any:
    for _ in range(steps):
        state = filter.step(state, at_M, mask_M)
    return state


def _values(filter: Any) -> list[Check]:
    def constant_in_constant_out() -> None:
        out = filter.signal(_run(filter, _entered(filter), G, 300, ON), G, ON)
        for name in ("g_M", "fast_M", "slow_M", "previous_M"):
            assert torch.allclose(getattr(out, name), G, rtol=1e-6), f"{name} = {getattr(out, name)}, not {G}"

    def follows_a_change() -> None:
        out = filter.signal(_run(filter, _entered(filter), G + 1, 5000, ON), G + 1, ON)
        assert torch.allclose(out.fast_M, G + 1, rtol=1e-3)
        assert torch.allclose(out.slow_M, G + 1, rtol=1e-3)

    def tick_remembers_fast() -> None:
        state = _run(filter, _entered(filter), G + 1, 3, ON)
        out = filter.signal(filter.tick(state), G, ON)
        assert torch.equal(out.previous_M, out.fast_M)
        assert not torch.equal(filter.signal(state, G, ON).previous_M, out.fast_M)

    return [constant_in_constant_out, follows_a_change, tick_remembers_fast]


def _rows(filter: Any) -> list[Check]:
    def held_still_where_off() -> None:
        mask_M, state = torch.tensor([True, False, True, False]), _entered(filter)
        moved = _run(filter, state, G + 1, 10, mask_M)
        assert same(tree.where(mask_M, state, moved), state), "a constraint that is off has moved the filter"
        assert not same(moved, state)

    def enter_touches_only_entering() -> None:
        state, entering_M = _run(filter, _entered(filter), G + 1, 3, ON), torch.tensor([False, True, False, False])
        after = filter.enter(state, G - 5, entering_M)
        assert same(tree.where(entering_M, state, after), state)
        assert torch.equal(filter.signal(after, G, ON).fast_M[1], G[1] - 5)

    return [held_still_where_off, enter_touches_only_entering]


def _contract(filter: Any) -> list[Check]:
    def signal_is_detached() -> None:
        live_M = G.clone().requires_grad_()
        out = filter.signal(_run(filter, _entered(filter), live_M.detach(), 3, ON), live_M.detach(), ON)
        assert not any(getattr(out, n).requires_grad for n in ("g_M", "fast_M", "slow_M", "previous_M", "rho_M"))
        try:
            filter.signal(_entered(filter), live_M, ON)
        except ValueError:
            return
        raise AssertionError("a live violation has become a Signal")

    def pure() -> None:
        assert is_pure(_entered(filter), lambda s: filter.step(s, G + 1, ON))
        assert is_pure(_run(filter, _entered(filter), G + 1, 3, ON), filter.tick)

    def has_a_clock() -> None:
        assert isinstance(filter.every, int)
        assert filter.every >= 1

    return [signal_is_detached, pure, has_a_clock]
