"""Table -> Plan: the source's facts, the knobs, the components, cross-checks, derived numbers. Makes no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, TypeVar

import attrs

from spalf.assembly import checks, derived, fill, walk
from spalf.assembly.convert import Converter
from spalf.assembly.registry import Registry
from spalf.assembly.toml import Table, dropped
from spalf.core.recipe import Knobs, Plan, Recipe
from spalf.core.slots import SLOTS, label
from spalf.core.values import Facts
from spalf.errors import Problem, RecipeError, SpalfError

T = TypeVar("T")


def compile(table: Table, registry: Registry, facts: Facts | None = None) -> Plan:
    """A recipe's plan. `facts` replace those of the source. Raises RecipeError with all of the recipe's problems."""
    converter = Converter(registry)
    table = fill.complete(dropped(table))
    knobs = _early(converter, table["knobs"], Knobs)
    problems: list[Problem] = []
    if facts is None:
        facts = _facts(converter, table.get("source"), problems)
    settled = _settle_knobs(knobs, facts) if knobs and facts else None
    recipe = _recipe(converter, table, settled, problems)
    if recipe is None or facts is None or settled is None:
        raise RecipeError(problems)
    problems += checks.names(recipe) + checks.numbers(recipe, facts, settled)
    rows = checks.rows(recipe, facts, settled.F, problems)
    if problems:
        raise RecipeError(problems)
    plan = Plan(
        recipe=recipe,
        facts=facts,
        knobs=settled,
        rows=rows,
        total_steps=recipe.budget.tokens // recipe.budget.batch,
        terms=_used(recipe, "terms"),
        constraints=_used(recipe, "constraints"),
        derived=(),
        origins=_origins(recipe, registry),
    )
    plan = _settle(plan)
    return attrs.evolve(plan, derived=derived.rows(plan, knobs=knobs or settled))


def _early(converter: Converter, value: Any, kind: type[T]) -> T | None:
    """What the facts depend on, ahead of the rest; its problems are told once, with all others."""
    try:
        return converter.structure(value, kind)
    except RecipeError:
        return None


def _facts(converter: Converter, value: Any, problems: list[Problem]) -> Facts | None:
    source: Any = None if value is None else _early(converter, value, SLOTS["source"].protocol)
    if source is None:
        return None
    try:
        facts: Facts = source.facts()
    except (SpalfError, ValueError, OSError) as e:
        problems += checks.located("source", e)
        return None
    if facts.d_model < 1:
        hint = "check the model's config, or source.d_model"
        problems.append(Problem("source", f"has activations of {facts.d_model} dimensions", hint))
        return None
    return facts


def _settle_knobs(knobs: Knobs, facts: Facts) -> Knobs:
    F = knobs.F or 32 * facts.d_model
    return attrs.evolve(knobs, F=F, L0_target=knobs.L0_target or ceil(F / 400))


def _recipe(
    converter: Converter, table: Mapping[str, Any], knobs: Knobs | None, problems: list[Problem]
) -> Recipe | None:
    """The whole recipe; `problems` takes what is wrong. Without knobs it is structured for its problems only."""
    stand_in = Knobs(F=4096, L0_target=16)
    filled = fill.with_knobs(table, converter.registry, knobs or stand_in)
    if knobs is not None:
        filled["knobs"] = attrs.asdict(knobs)
    try:
        return converter.structure(filled, Recipe)
    except RecipeError as e:
        problems += [p for p in e.problems if p not in problems]
        return None


def _used(recipe: Recipe, option: str) -> tuple[str, ...]:
    return tuple(sorted({name for phase in walk.listed_phases(recipe) for name in getattr(phase, option, ())}))


def _origins(recipe: Recipe, registry: Registry) -> dict[str, str]:
    refs = {label(type(component)) for _, component in walk.components(recipe)}
    return {f"{ref.slot}.{ref.use}": registry.origin(ref) for ref in sorted(refs, key=str)}


def _settle(plan: Plan) -> Plan:
    """Each component's `settle(plan)`, in the order of the slots: it sees what was settled before it."""
    problems: list[Problem] = []
    idle = walk.idle(plan.recipe)

    def change(path: str, component: Any) -> Any:
        try:
            return component.settle(plan) if hasattr(component, "settle") else component
        except (SpalfError, ValueError) as e:
            problems.extend(checks.located(path, e))
            return component

    for path, component in list(walk.components(plan.recipe)):
        if _is_outer(path) and path not in idle:
            plan = attrs.evolve(plan, recipe=walk.replaced(plan.recipe, path, walk.rebuilt(path, component, change)))
    if not problems:
        plan = attrs.evolve(plan, rows=checks.rows(plan.recipe, plan.facts, plan.knobs.F, problems))
    if problems:
        raise RecipeError(problems)
    return plan


def _is_outer(path: str) -> bool:
    """Whether `path` is a slot's or a named table's: inner components are settled with their outer one."""
    slot = SLOTS[path.split(".")[0]]
    return path.count(".") == (1 if slot.form == "named" else 0)
