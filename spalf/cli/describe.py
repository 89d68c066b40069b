"""What a component says about itself, as plain records: for tables and for JSON alike."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from spalf.assembly.options import option_types, options, slot_of
from spalf.assembly.registry import Registry
from spalf.core.slots import ComponentRef

HOOKS = ("spalf_components", "spalf_commands", "spalf_phase_entered", "spalf_stepped", "spalf_saved")


def outline(registry: Registry, ref: ComponentRef) -> dict[str, Any]:
    """Slot, name, origin and the first line of the docstring."""
    doc = inspect.getdoc(registry.resolve(ref.slot, ref.use)) or ""
    return {
        "slot": ref.slot,
        "name": ref.use,
        "origin": registry.origin(ref),
        "doc": doc.partition("\n")[0],
    }


def describe(registry: Registry, ref: ComponentRef) -> dict[str, Any]:
    """The outline with the whole docstring, what it needs of its source, and every option."""
    cls = registry.resolve(ref.slot, ref.use)
    return outline(registry, ref) | {
        "doc": inspect.getdoc(cls) or "",
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "needs": sorted(getattr(cls, "needs", ())),
        "options": option_rows(cls),
    }


def option_rows(cls: type) -> list[dict[str, Any]]:
    """Name, type, default (or where it comes from), bounds and meaning of every option."""
    kinds, meanings = option_types(cls), _meanings(cls)
    return [
        {
            "name": key,
            "type": type_text(kinds[a.name]),
            **_default(a),
            "bounds": bounds(a.validator),
            "doc": meanings.get(a.name, ""),
        }
        for key, a in options(cls).items()
    ]


def type_text(hint: Any) -> str:
    """A type as a recipe's author thinks of it; a slot's protocol is "a gate"."""
    if hint is None or hint is type(None):
        return "none"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    slot = slot_of(hint)
    if slot is not None:
        return f"a {slot.name}"
    if origin is typing.Literal:
        return " | ".join(f'"{a}"' if isinstance(a, str) else repr(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_text(a) for a in args)
    if origin is not None and args and issubclass(origin, Mapping):
        return f"table of {type_text(args[-1])}"
    if origin is tuple and Ellipsis not in args:
        return "[" + ", ".join(type_text(a) for a in args) + "]"
    if origin is not None and args:
        return f"array of {type_text(args[0])}"
    return getattr(hint, "__name__", str(hint))


def _default(a: attrs.Attribute[Any]) -> dict[str, Any]:
    """`default` with its value, or `from` with the knob or "required"."""
    if "use" in a.metadata:
        return {"default": a.metadata["use"]}
    knob = a.metadata.get("knob")
    if knob is not None:
        return {"from": f"knobs.{knob}"}
    if a.default is attrs.NOTHING:
        return {"from": "required"}
    if isinstance(a.default, attrs.Factory):  # type: ignore[arg-type]
        factory: Any = a.default
        return {"from": "derived"} if factory.takes_self else {"default": factory.factory()}
    return {"default": a.default}


def bounds(validator: Any) -> str:
    """What a validator of attrs asks for, such as "> 0, < 1"; "" where it asks for nothing that can be read."""
    if validator is None:
        return ""
    parts = getattr(validator, "_validators", None) or getattr(validator, "validators", None)
    if parts is not None:
        return ", ".join(text for text in map(bounds, parts) if text)
    if hasattr(validator, "compare_op"):
        return f"{validator.compare_op} {validator.bound:g}"
    if hasattr(validator, "member_validator"):
        inner = bounds(validator.member_validator)
        return f"each {inner}" if inner else ""
    if hasattr(validator, "options"):
        return "one of " + ", ".join(str(o) for o in validator.options)
    if hasattr(validator, "min_length"):
        return f"length >= {validator.min_length}"
    if hasattr(validator, "validator"):
        return bounds(validator.validator)
    doc = inspect.getdoc(validator) if inspect.isfunction(validator) else ""
    return (doc or "").partition("\n")[0].rstrip(".")


def _meanings(cls: type) -> dict[str, str]:
    """Docstrings that follow an option in the body of the class or of one it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _meanings_in(base)
    return found


def _meanings_in(cls: type) -> dict[str, str]:
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    found = {}
    for one, after in zip(body.body, body.body[1:], strict=False) if isinstance(body, ast.ClassDef) else ():
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(after, ast.Expr):
            text = after.value.value if isinstance(after.value, ast.Constant) else None
            if isinstance(text, str):
                found[one.target.id] = " ".join(text.split())
    return found


def plugin_rows(manager: Any, registry: Registry, origin_of: Callable[[str], str]) -> list[dict[str, Any]]:
    """Every plugin with its distribution, its components and the hooks that it answers."""
    offered = {registry.resolve(ref.slot, ref.use): f"{ref.slot}.{ref.use}" for ref in registry}
    rows = []
    for name, plugin in manager.list_name_plugin():
        callers = manager.get_hookcallers(plugin) or []
        answers = {caller.name for caller in callers}
        classes = plugin.spalf_components() if "spalf_components" in answers else []
        rows.append(
            {
                "name": name,
                "origin": origin_of(name),
                "components": [offered[cls] for cls in classes if cls in offered],
                "hooks": [hook for hook in HOOKS if hook in answers],
            }
        )
    return rows
