"""Rows about budgets for `spalf compile`."""

from __future__ import annotations

from spalf.core.protocols import Constraint
from spalf.core.recipe import Derived, Plan


def measured(constraint: Constraint, plan: Plan, formula: str) -> list[Derived]:
    """The row of a budget that is measured when the first phase that uses the constraint is entered."""
    names = [name for name, part in plan.recipe.constraint.items() if part is constraint]
    phases = plan.recipe.phases
    using = [p for p in phases for n in names if n in getattr(plan.recipe.phase[p], "constraints", ())]
    origin = f"on entering phase.{using[0]}" if using else "on entering its phase"
    return [Derived(path="budget", value=None, formula=formula, origin=origin)]
