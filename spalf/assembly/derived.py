"""The derived numbers of a plan: value or None (calibrated), formula, origin."""

from __future__ import annotations

import inspect
import re

import attrs

from spalf.assembly import estimate, walk
from spalf.assembly.checks import located
from spalf.core.recipe import Derived, Knobs, Plan
from spalf.core.slots import label
from spalf.errors import RecipeError, SpalfError


def rows(plan: Plan, knobs: Knobs) -> tuple[Derived, ...]:
    """All rows, one per path; `knobs` as the table gave them, before they were settled."""
    found = [*_sizes(plan, knobs), *_strata(plan), *_components(plan), *_budgets(plan), *estimate.rows(plan)]
    unique = {row.path: row for row in reversed(found)}
    return tuple(unique[path] for path in dict.fromkeys(row.path for row in found))


def _sizes(plan: Plan, knobs: Knobs) -> list[Derived]:
    def knob(name: str, value: float, formula: str) -> Derived:
        if getattr(knobs, name) == 0:
            return Derived(path=name, value=value, formula=formula, origin=f"knobs.{name} = 0")
        return Derived(path=name, value=value, formula="given", origin=f"knobs.{name}")

    steps = plan.total_steps
    return [
        knob("F", plan.knobs.F, "32 * d_model"),
        knob("L0_target", plan.knobs.L0_target, "ceil(F / 400)"),
        Derived(path="total_steps", value=steps, formula="budget.tokens // budget.batch", origin="budget"),
    ]


def _strata(plan: Plan) -> list[Derived]:
    """What a stratum's own `derive` says of its rows comes first."""
    out = []
    for name, n in plan.rows.items():
        stratum, path = plan.recipe.stratum[name], f"stratum.{name}.rows"
        own = [row for row in _of(plan, f"stratum.{name}", stratum) if row.path == path]
        formula = _first_sentence(type(stratum).rows) or "its own rule"
        out += own or [Derived(path=path, value=n, formula=formula, origin=f"stratum.{name}")]
    return out


def _components(plan: Plan) -> list[Derived]:
    skipped = walk.idle(plan.recipe)
    return [
        row
        for path, component in walk.components(plan.recipe)
        if not any(path == p or path.startswith(f"{p}.") for p in skipped)
        for row in _of(plan, path, component)
    ]


def _of(plan: Plan, path: str, component: object) -> list[Derived]:
    """A component's own rows, under the name that the recipe gives it."""
    if not hasattr(component, "derive"):
        return []
    try:
        found: list[Derived] = component.derive(plan)
    except (SpalfError, ValueError) as e:
        raise RecipeError(located(path, e)) from e
    return [attrs.evolve(row, path=_path(path, component, row.path)) for row in found]


def _path(path: str, component: object, own: str) -> str:
    """A component knows its slot and its label, not its name: it may begin a path with either, or with neither."""
    ref = label(type(component))
    if own == path or own.startswith(f"{path}."):
        return own
    for prefix in (f"{ref.slot}.{ref.use}.", f"{ref.slot}.", f"{ref.use}."):
        if own.startswith(prefix):
            return f"{path}.{own.removeprefix(prefix)}"
    return f"{path}.{own}"


def _budgets(plan: Plan) -> list[Derived]:
    """A budget that no component derives is measured when its constraint is switched on."""
    out = []
    for name in plan.constraints:
        phase = next(n for n in plan.recipe.phases if name in getattr(plan.recipe.phase[n], "constraints", ()))
        formula = _first_sentence(type(plan.recipe.constraint[name])) or "measured"
        origin = f"on entering phase.{phase}"
        out.append(Derived(path=f"constraint.{name}.budget", value=None, formula=formula, origin=origin))
    return out


def _first_sentence(documented: object) -> str:
    """A contract's first line, without the full stop and what follows it."""
    first = (inspect.getdoc(documented) or "").partition("\n")[0]
    return re.split(r"[.:] |[.:]$", first)[0]
