"""Recipe files: reading with one parent, merging, settings from the command line, writing.

A `Table` is what a TOML file says: dicts, lists and scalars, nothing settled. Merging goes by key; lists, scalars and
a table that changes its `use` are replaced whole, so no stale option leaks through. `dual = "pi"` is short for
`dual = { use = "pi" }`, and `evaluator.x = false` drops a named table that the parent declares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli
import tomli_w

from spalf.assembly.hints import quoted, shown, suggest
from spalf.core.slots import SLOTS
from spalf.errors import Problem, RecipeError

Table = dict[str, Any]
"""A recipe as text has it."""


def presets() -> tuple[str, ...]:
    """Names of the recipes that the package ships as parents."""
    folder = files("spalf") / "presets"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def preset(name: str) -> str:
    """The text of a preset. Raises RecipeError with the nearest name."""
    if name not in presets():
        hint = suggest(name, presets(), "presets")
        raise _error("extends", f"no preset is called {quoted(name)}", hint + "; a file needs a / or .toml in its name")
    return (files("spalf") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def read(path_or_name: str | Path, sets: Iterable[str] = ()) -> Table:
    """A recipe file, or a preset by its bare name, merged over its parents; then each of `sets` ("a.b=value").

    Raises RecipeError at a file that is missing or no TOML (with line and column), and at parents that form a circle.
    """
    table = _with_parents(path_or_name, Path(), ())
    for text in sets:
        table = merge(table, setting(text))
    return dropped(table)


def parse(text: str, place: str) -> Table:
    """TOML text as a table; `place` is what an error calls it."""
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as e:
        raise _error(f"{place}:{e.lineno}:{e.colno}", _sentence(e.msg), "this is not TOML") from None
    except (RecursionError, ValueError) as e:  # an integer of thousands of digits, brackets without end
        raise _error(place, f"cannot be read: {_sentence(str(e))}") from None


def write(table: Mapping[str, Any]) -> str:
    """TOML text that `parse` turns back into the same table."""
    return tomli_w.dumps(table)


def setting(text: str) -> Table:
    """One `a.b=value` as a table. The value is TOML, or else text: `name=toy` needs no quotes."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise _error("--set", f"{quoted(text)} is not a setting", "write --set path.to.option=value")
    try:
        table = tomli.loads(f"{key} = 0")
    except tomli.TOMLDecodeError:
        raise _error("--set", f"{quoted(key)} is not a path", "write names with dots between: dual.kp") from None
    if "extends" in table:
        raise _error("--set", "extends cannot be set", "name the parent in the recipe file")
    inner = table
    while isinstance(inner[name := next(iter(inner))], dict):
        inner = inner[name]
    inner[name] = _value(value.strip())
    return table


def merge(parent: Mapping[str, Any], child: Mapping[str, Any], path: tuple[str, ...] = ()) -> Table:
    """`child` over `parent`; both stay as they are."""
    out = dict(parent)
    for key, new in child.items():
        out[key] = _merged(out[key], new, (*path, key)) if key in out else new
    return out


def dropped(table: Mapping[str, Any]) -> Table:
    """Without the named tables that are set to false."""
    out = dict(table)
    for slot in SLOTS.values():
        named = out.get(slot.name)
        if slot.form == "named" and isinstance(named, dict):
            out[slot.name] = {k: v for k, v in named.items() if v is not False}
    return out


def _merged(old: Any, new: Any, path: tuple[str, ...]) -> Any:
    if _is_component(path) or (_is_inner(path) and isinstance(old, dict) != isinstance(new, dict)):
        old, new = _long(old), _long(new)
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    is_other = "use" in new and new["use"] != _use(old, path)
    return new if is_other else merge(old, new, path)


def _is_component(path: tuple[str, ...]) -> bool:
    """Whether what lies at `path` is a slot's or a named table's: dual, term.l0."""
    slot = SLOTS.get(path[0])
    return slot is not None and len(path) == (2 if slot.form == "named" else 1)


def _is_inner(path: tuple[str, ...]) -> bool:
    """Whether what lies at `path` is inside a component's table, where a name may stand for a component."""
    slot = SLOTS.get(path[0])
    return len(path) > (2 if slot is None or slot.form == "named" else 1)


def _long(value: Any) -> Any:
    return {"use": value} if isinstance(value, str) else value


def _use(table: Table, path: tuple[str, ...]) -> Any:
    """In a named slot `use` defaults to the table's own name."""
    slot = SLOTS.get(path[0])
    own = path[1] if slot is not None and slot.form == "named" and len(path) == 2 else None
    return table.get("use", own)


def _with_parents(path_or_name: str | Path, folder: Path, below: tuple[str, ...]) -> Table:
    text, place, folder = _load(path_or_name, folder)
    if place in below:
        raise _error(place, "extends itself: " + " -> ".join((*below, place)), "take one of these parents away")
    table = parse(text, place)
    if "extends" not in table:
        return table
    parent = table.pop("extends")
    if not isinstance(parent, str):
        raise _error(f"{place}: extends", f"expected str, got {shown(parent)}", "a recipe has one parent")
    return merge(_with_parents(parent, folder, (*below, place)), table)


def _load(path_or_name: str | Path, folder: Path) -> tuple[str, str, Path]:
    """Text, the place that errors name, and the folder that relative parents count from."""
    name = str(path_or_name)
    if isinstance(path_or_name, str) and "/" not in name and not name.endswith(".toml"):
        return preset(name), f"preset {name}", Path()
    path = folder / name
    try:
        return path.read_text(encoding="utf-8"), str(path.resolve()), path.parent
    except UnicodeDecodeError:
        raise _error(str(path), "is not UTF-8 text", "a recipe is a TOML file") from None
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        hint = "presets: " + ", ".join(presets()) if not path.is_dir() else "name a file"
        raise _error(str(path), f"cannot be read: {reason}", hint) from None


def _value(text: str) -> Any:
    try:
        table = tomli.loads(f"value = {text}")
    except (tomli.TOMLDecodeError, RecursionError, ValueError):
        return text
    return table["value"] if len(table) == 1 else text


def _sentence(text: str) -> str:
    return text[:1].lower() + text[1:]


def _error(path: str, message: str, hint: str = "") -> RecipeError:
    return RecipeError([Problem(path, message, hint)])
