"""The dual side's checks: what every penalty and gate must do, and what the other slots' modules share.

M constraints. Each of `filter`, `dual` and `lagrangian` has a module of its own beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from spalf.core import tree
from spalf.core.recipe import Budget, Knobs, Plan, Recipe, Record
from spalf.core.slots import label
from spalf.core.values import Clock, Facts, Signal
from spalf.parts.filter import DualRateEma
from spalf.testing import Check, signal

EXAMPLES: Mapping[tuple[str, str], Mapping[str, Any]] = {
    # Gains per tick for the bank's problems on a clock of one step, whose primal answers in about 25 steps.
    ("dual", "adrc"): {"memory": 25.0, "delay": 0.0},
    ("dual", "pi"): {"kp": 0.5, "ki": 0.1},
    ("dual", "nupi"): {"kp": 0.5, "ki": 0.1},
    ("dual", "ascent"): {"rate": 0.1},
}


def checks(cls: type, component: Any) -> list[Check]:
    """The checks of this component's slot."""
    from spalf.testing.dual import dual_checks
    from spalf.testing.filter import filter_checks
    from spalf.testing.lagrangian import lagrangian_checks

    table: dict[str, Callable[[Any], list[Check]]] = {
        "filter": filter_checks,
        "dual": dual_checks,
        "penalty": _penalty,
        "lagrangian": lagrangian_checks,
        "gate": _gate,
    }
    return table[label(cls).slot](component)


def settled(component: Any, every: int, filter: Any = None) -> Any:
    """The component with its derived options filled in for a clock of `every` steps."""
    if not hasattr(component, "settle"):
        return component
    return component.settle(control_plan(filter or DualRateEma(every=every)))


def control_plan(filter: Any) -> Plan:
    """A plan that holds what the dual side reads of one, the filter; its other components are absent."""
    absent = cast(Any, None)
    recipe = Recipe(
        name="kit",
        phases=(),
        strata=(),
        knobs=Knobs(F=64, L0_target=4),
        budget=Budget(),
        record=Record(),
        source=absent,
        whitener=absent,
        activation=absent,
        filter=filter,
        dual=absent,
        penalty=absent,
        lagrangian=absent,
        optimizer=absent,
        kernel=absent,
        stratum={},
        term={},
        constraint={},
        phase={},
        evaluator={},
    )
    facts = Facts(d_model=16)
    return Plan(
        recipe=recipe, facts=facts, knobs=recipe.knobs, rows={}, total_steps=1000, terms=(), constraints=(), derived=()
    )


def drawn(seed: int, *shape: int, spread: float = 1.0) -> Tensor:
    """Normal numbers, the same for a seed on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def same(a: Any, b: Any) -> bool:
    """Whether two states hold the same leaves, NaN included."""
    left, right = tree.flatten(a), tree.flatten(b)
    return left.keys() == right.keys() and all(
        torch.equal(torch.nan_to_num(x, nan=0.125), torch.nan_to_num(y, nan=0.125))
        if isinstance(x, Tensor) and isinstance(y, Tensor)
        else x == y
        for x, y in zip(left.values(), right.values(), strict=True)
    )


def copied(state: Any) -> Any:
    """The state with every tensor cloned."""
    return tree.restore(state, {k: v.clone() if isinstance(v, Tensor) else v for k, v in tree.flatten(state).items()})


def is_pure(state: Any, step: Callable[[Any], Any]) -> bool:
    """Whether a step leaves its state alone and repeats itself."""
    before = copied(state)
    first, second = step(state), step(state)
    return same(state, before) and same(first, second)


def _penalty(given: Any) -> list[Check]:
    penalty = settled(given, every=100)
    m = 32
    on_M = torch.ones(m, dtype=torch.bool)

    def entered() -> Any:
        return penalty.enter(penalty.init(m), drawn(0, m), on_M)

    def step(state: Any, v_M: Tensor, mask_M: Tensor = on_M) -> Any:
        return penalty.step(state, signal(v_M, previous=v_M, on=mask_M, rho=state.rho_M))

    def positive_and_bounded() -> None:
        state = entered()
        spread_M = torch.logspace(-12, 6, m)
        for t in range(2000):
            state = step(state, drawn(t, m) * spread_M)
            assert bool((state.rho_M > 0).all()), "a penalty is not positive"
            assert bool((state.rho_M < 1e6).all()), f"a penalty has reached {float(state.rho_M.max())}"

    def enter_touches_only_entering() -> None:
        state = entered()
        for t in range(300):
            state = step(state, drawn(t, m, spread=3.0))
        entering_M = torch.arange(m) % 3 == 0
        after = penalty.enter(state, drawn(1, m), entering_M)
        assert same(tree.where(entering_M, state, after), state)

    def rows_are_independent() -> None:
        order = torch.randperm(m, generator=torch.Generator().manual_seed(0))
        state, shuffled = entered(), entered()
        for t in range(300):
            state, shuffled = step(state, drawn(t, m)), step(shuffled, drawn(t, m)[order])
        assert torch.equal(state.rho_M[order], shuffled.rho_M)

    def pure() -> None:
        assert is_pure(entered(), lambda s: step(s, drawn(3, m)))
        assert is_pure(entered(), lambda s: penalty.enter(s, drawn(3, m), on_M))

    return [positive_and_bounded, enter_touches_only_entering, rows_are_independent, pure]


def _gate(gate: Any) -> list[Check]:
    total = 1000

    def run(state: Any, v: float, start: int, stop: int) -> Any:
        for t in range(start, stop):
            state = gate.step(state, signal([v, v]), Clock(step=t, total=total))
        return state

    def closed_at_start() -> None:
        assert gate.open(gate.init(), Clock(step=0, total=total)) is False
        assert gate.open(run(gate.init(), -1.0, 0, 2), Clock(step=2, total=total)) is False

    def open_when_the_budget_is_spent() -> None:
        assert gate.open(run(gate.init(), 1.0, 0, total), Clock(step=total, total=total)) is True

    def stays_open() -> None:
        state, opened = gate.init(), None
        for t in range(total + 1):
            # feasible first, violated in the last part: what has opened may not close again
            state = gate.step(state, signal([-1.0 if t < 0.96 * total else 1.0] * 2), Clock(step=t, total=total))
            is_open = gate.open(state, Clock(step=t, total=total))
            opened = t if is_open and opened is None else opened
            assert is_open is (opened is not None), f"opened at {opened} and closed at {t}"
        assert opened is not None

    def step_makes_no_host_copy() -> None:
        # A tensor on the meta device has no value: whoever asks for one fails.
        away = torch.device("meta")
        seen: Signal = tree.to(signal([-1.0, 0.5]), away)
        state = tree.to(gate.init(), away)
        for t in (0, total // 2, total - 1):
            state = gate.step(state, seen, Clock(step=t, total=total))

    def pure() -> None:
        assert is_pure(gate.init(), lambda s: gate.step(s, signal([-1.0]), Clock(step=5, total=total)))

    return [closed_at_start, open_when_the_budget_is_spent, stays_open, step_makes_no_host_copy, pure]
