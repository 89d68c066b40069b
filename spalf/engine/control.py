"""The dual side of one step: filter, multipliers, penalties. Pure functions on frozen records."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from spalf.core import tree
from spalf.core.protocols import Dual, Filter, Penalty
from spalf.core.state import ControlState
from spalf.core.values import Clock, Signal


def init(filter: Filter[Any], dual: Dual[Any], penalty: Penalty[Any], m: int) -> ControlState:
    """The dual side of `m` constraints, all off, on the CPU; budgets are 1 until their constraint enters."""
    return ControlState(
        budget_M=torch.ones(m),
        on_M=torch.zeros(m, dtype=torch.bool),
        filter=filter.init(m),
        dual=dual.init(m),
        penalty=penalty.init(m),
    )


def enter(
    filter: Filter[Any],
    penalty: Penalty[Any],
    control: ControlState,
    entering_M: Tensor,
    budget_M: Tensor,
    g_M: Tensor,
) -> ControlState:
    """Switch `entering_M` on, with their budgets and first violations; other rows of both are not read.

    Multipliers are left as they are: 0 at the first entry, carried over at a later one.
    """
    g_M = g_M.detach()
    return evolve(
        control,
        budget_M=torch.where(entering_M, budget_M.detach(), control.budget_M),
        on_M=control.on_M | entering_M,
        filter=tree.where(entering_M, filter.enter(control.filter, g_M, entering_M), control.filter),
        penalty=tree.where(entering_M, penalty.enter(control.penalty, g_M, entering_M), control.penalty),
    )


def step(
    filter: Filter[Any],
    dual: Dual[Any],
    penalty: Penalty[Any],
    control: ControlState,
    g_M: Tensor,
    clock: Clock,
    hold: Collection[str] = (),
) -> tuple[ControlState, Signal]:
    """Show this batch's detached violations to the controllers; multipliers and penalties move on the filter's ticks.

    `hold` names what stays still: "dual", "penalty". Constraints that are off are left untouched. Makes no host copy.
    Raises ValueError where `g_M` carries a graph.
    """
    on_M = control.on_M
    seen = filter.step(control.filter, g_M, on_M)
    # The law sees the penalties that were in force while these violations arose.
    signal = evolve(filter.signal(seen, g_M, on_M), rho_M=control.rho_M)
    if not clock.due(filter.every):
        return evolve(control, filter=seen), signal
    moved = evolve(control, filter=filter.tick(seen))
    if "dual" not in hold:
        moved = evolve(moved, dual=tree.where(on_M, dual.step(control.dual, signal), control.dual))
    if "penalty" not in hold:
        moved = evolve(moved, penalty=tree.where(on_M, penalty.step(control.penalty, signal), control.penalty))
    return moved, signal


def hand_over(control: ControlState, pairs: Collection[tuple[int, int]]) -> ControlState:
    """For each (a, b): constraint b takes over a's multiplier and penalty, each with its law's whole state.

    To be called after `enter`, which starts the penalties of entering constraints anew; the filters stay, for they hold
    b's own violations.
    """
    m = control.on_M.shape[0]
    source = torch.arange(m, device=control.on_M.device)
    for a, b in pairs:
        source[b] = a

    def moved(record: Any) -> Any:
        return tree.apply(lambda x: x[source] if x.ndim and x.shape[0] == m else x, record)

    return evolve(control, dual=moved(control.dual), penalty=moved(control.penalty))
