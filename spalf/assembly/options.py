"""What a component class says about its options: their types, the slots among them, and what its validators mean."""

from __future__ import annotations

import re
from typing import Any, get_origin, get_type_hints

import attrs

from spalf.assembly.hints import plain, suggest
from spalf.core import protocols
from spalf.core.slots import SLOTS, Slot
from spalf.errors import ComponentError


def options(cls: type) -> dict[str, attrs.Attribute[Any]]:
    """The fields that a table may set, by the key that sets them."""
    return {a.alias or a.name: a for a in attrs.fields(cls) if a.init}


def option_types(cls: type) -> dict[str, Any]:
    """Evaluated type of each field. Raises ComponentError where one cannot be evaluated at run time."""
    try:
        # core.recipe knows the protocols under TYPE_CHECKING only, as `p`: they know the recipe.
        return get_type_hints(cls, localns={"p": protocols})
    except (NameError, TypeError) as e:
        raise ComponentError(
            f"{cls.__module__}.{cls.__qualname__}: {e} (import option types at run time, not under TYPE_CHECKING)"
        ) from e


def slot_of(kind: Any) -> Slot | None:
    """The slot whose protocol a type is, parametrised or not: `Gate[Any]` is the gate's."""
    protocol = get_origin(kind) or kind
    return next((slot for slot in SLOTS.values() if slot.protocol is protocol), None)


def complaint(error: Exception, name: str, value: object) -> tuple[str, str]:
    """A validator's exception about option `name` as one sentence and a hint."""
    text = str(error.args[0]) if error.args else type(error).__name__
    if found := re.fullmatch(r"'\w+' must be ([<>=!]+) (.+): (.*)", text, re.DOTALL):
        relation, bound, got = found.groups()
        return f"must be {relation} {bound}, got {got}", ""
    if found := re.fullmatch(r"Length of '\w+' must be ([<>]=) (\d+): (\d+)", text):
        relation, bound, got = found.groups()
        noun = "entry" if bound == "1" else "entries"
        return f"must have at {'least' if relation == '>=' else 'most'} {bound} {noun}, got {got}", ""
    if found := re.match(r"'\w+' must match regex (.+) \(", text, re.DOTALL):
        return f"must match the pattern {found.group(1)}, got {plain(value)}", ""
    if re.match(r"'\w+' must be in ", text) and len(error.args) == 4:
        allowed, got = list(error.args[2]), error.args[3]
        hint = suggest(got, allowed, "one of these") if isinstance(got, str) else ""
        return f"must be one of {', '.join(map(plain, allowed))}, got {plain(got)}", hint if "mean" in hint else ""
    message = re.sub(rf"^'?{re.escape(name)}'?:? ", "", text)
    if plain(value) not in message and str(value) not in message:
        message += f", got {plain(value)}"
    return " ".join(message.split()), ""
