"""What a recipe may leave out: whole tables, and options that are one of the knobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from spalf.assembly.options import option_types, options, slot_of
from spalf.assembly.registry import Registry
from spalf.core.recipe import Knobs
from spalf.core.slots import SLOTS
from spalf.errors import ComponentError, RecipeError


def complete(table: Mapping[str, Any]) -> dict[str, Any]:
    """With an empty table where leaving one out means its defaults."""
    named = (slot.name for slot in SLOTS.values() if slot.form == "named")
    return {**{key: {} for key in ("knobs", "budget", "record", *named)}, **table}


def with_knobs(table: Mapping[str, Any], registry: Registry, knobs: Knobs) -> dict[str, Any]:
    """`table` with each missing `from_knob` option at its knob's value, each missing `from_slot` one by its name.

    What is no component stays as it is.
    """
    out = dict(table)
    for slot in SLOTS.values():
        value = out.get(slot.name)
        if slot.form == "one" and value is not None:
            out[slot.name] = _component(value, slot.name, None, registry, knobs)
        elif slot.form == "named" and isinstance(value, Mapping):
            out[slot.name] = {name: _component(item, slot.name, name, registry, knobs) for name, item in value.items()}
    return out


def _component(value: Any, slot: str, name: str | None, registry: Registry, knobs: Knobs) -> Any:
    """The table of one component and of those inside it."""
    table = {"use": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping):
        return value
    use = table.get("use", name)
    try:
        cls = registry.resolve(slot, use) if isinstance(use, str) else None
    except RecipeError:
        cls = None
    if cls is None:
        return value
    out = dict(table)
    kinds = option_types(cls)
    for key, a in options(cls).items():
        inner = slot_of(kinds[a.name])
        own = a.metadata.get("use")
        if inner is not None and (key in out or own is not None):
            out[key] = _component(_named(out.get(key, {}), own), inner.name, None, registry, knobs)
        elif "knob" in a.metadata and key not in out:
            out[key] = _knob(cls, a, knobs)
    return out


def _named(value: Any, use: str | None) -> Any:
    """A table that names no component gets the name that its option has."""
    return {"use": use, **value} if use is not None and isinstance(value, Mapping) else value


def _knob(cls: type, a: attrs.Attribute[Any], knobs: Knobs) -> Any:
    name = a.metadata["knob"]
    known = [k.name for k in attrs.fields(Knobs)]
    if name not in known:
        raise ComponentError(f'{cls.__module__}.{cls.__qualname__}.{a.name}: no knob is called "{name}" ({known})')
    return getattr(knobs, name)
