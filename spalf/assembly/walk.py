"""Every component of a recipe with its path, inner ones included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs

from spalf.core.recipe import Recipe
from spalf.core.slots import SLOTS, label


def components(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """(path, component) in the order of the slots: "dual", "term.l0", "phase.fit", "phase.fit.gate"."""
    for slot in SLOTS.values():
        if slot.form == "one":
            yield from _within(slot.name, getattr(recipe, slot.name))
        elif slot.form == "named":
            for name, component in getattr(recipe, slot.name).items():
                yield from _within(f"{slot.name}.{name}", component)


def replaced(recipe: Recipe, path: str, component: Any) -> Recipe:
    """The recipe with another component at the path of a slot or of a named table."""
    slot, _, name = path.partition(".")
    change: dict[str, Any] = {slot: {**getattr(recipe, slot), name: component} if name else component}
    return attrs.evolve(recipe, **change)


def rebuilt(path: str, component: Any, change: Callable[[str, Any], Any]) -> Any:
    """`change` applied to a component's inner components first, then to itself."""
    inner = {key: rebuilt(f"{path}.{key}", value, change) for key, value in _inner(component) if is_component(value)}
    return change(path, attrs.evolve(component, **inner) if inner else component)


def is_component(value: Any) -> bool:
    return "__spalf__" in vars(type(value))


def idle(recipe: Recipe) -> tuple[str, ...]:
    """Paths of named tables that no list mentions: allowed, and of no effect."""
    used = {"stratum": set(recipe.strata), "phase": set(recipe.phases)}
    for key, option in (("term", "terms"), ("constraint", "constraints")):
        used[key] = {n for phase in listed_phases(recipe) for n in getattr(phase, option, ())}
    return tuple(f"{slot}.{n}" for slot, names in used.items() for n in getattr(recipe, slot) if n not in names)


def listed_phases(recipe: Recipe) -> list[Any]:
    """The phases that a run goes through, in order; an undeclared one is left out."""
    return [recipe.phase[name] for name in recipe.phases if name in recipe.phase]


def called(component: Any) -> str:
    """A component as a message names it: source "huggingface"."""
    ref = label(type(component))
    return f'{ref.slot} "{ref.use}"'


def _within(path: str, component: Any) -> Iterator[tuple[str, Any]]:
    yield path, component
    for key, value in _inner(component):
        if is_component(value):
            yield from _within(f"{path}.{key}", value)


def _inner(component: Any) -> Iterator[tuple[str, Any]]:
    for a in attrs.fields(type(component)):
        yield a.alias or a.name, getattr(component, a.name)
