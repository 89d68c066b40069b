"""Tables <-> components, strictly; every problem of a table is collected with its path.

Inside a hook a problem's path counts from the value at hand; each container puts its own name in front.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import attrs
import cattrs

from spalf.assembly.hints import plain, shown, suggest
from spalf.assembly.options import complaint, option_types, options, slot_of
from spalf.assembly.registry import Registry
from spalf.core.slots import ComponentRef
from spalf.errors import ComponentError, Problem, RecipeError

T = TypeVar("T")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_SCALARS = (int, float, bool, str)


class Converter:
    """The strict cattrs converter of one registry."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        conv = self._conv = cattrs.Converter()
        hook = conv.register_structure_hook_func
        hook(attrs.has, self._record)
        hook(_is(Mapping, dict), self._mapping)
        hook(_is(tuple, list, frozenset, set, Sequence), self._array)
        hook(_is(Literal), _literal)
        hook(_is(Union, UnionType), self._union)
        hook(lambda t: slot_of(t) is not None, self._component)
        for scalar in _SCALARS:
            conv.register_structure_hook(scalar, _scalar)
        write = conv.register_unstructure_hook_func
        write(_is(Mapping, dict), lambda x: {k: self.unstructure(v) for k, v in x.items()})
        write(_is(tuple, list), lambda x: [self.unstructure(v) for v in x])
        write(_is(frozenset, set), lambda x: sorted(self.unstructure(v) for v in x))
        write(attrs.has, self._table)

    def structure(self, value: Any, kind: type[T], path: str = "") -> T:
        """`value` as a `kind`. Raises RecipeError with every problem in it; their paths begin with `path`."""
        try:
            return self._conv.structure(value, kind)
        except RecipeError as e:
            raise RecipeError(_below(path, e)) from None
        except cattrs.StructureHandlerNotFoundError as e:
            raise ComponentError(f"{path or kind}: an option of type {e.type_} cannot be written in TOML") from e

    def unstructure(self, value: Any) -> Any:
        """The table of a record or a component, with every default written; an option that is None is left out."""
        return self._conv.unstructure(value)

    # ------------------------------------------------------------------------------------------- tables
    def _component(self, value: Any, kind: Any) -> Any:
        slot = slot_of(kind)
        assert slot is not None
        table = {"use": value} if isinstance(value, str) else value
        if not isinstance(table, Mapping):
            raise _problem(f"expected a table or a name, got {shown(value)}")
        names = self.registry.names(slot.name)
        if "use" not in table:
            raise _problem("is required and missing", suggest("", names, "known"), "use")
        if not isinstance(table["use"], str):
            raise _problem(f"expected str, got {shown(table['use'])}", "", "use")
        try:
            cls = self.registry.resolve(slot.name, table["use"])
        except RecipeError as e:
            raise RecipeError(attrs.evolve(p, path="") for p in e.problems) from None
        return self._conv.structure({k: v for k, v in table.items() if k != "use"}, cls)

    def _mapping(self, value: Any, kind: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise _problem(f"expected a table, got {shown(value)}")
        inner = (get_args(kind) or (str, Any))[1]
        slot = slot_of(inner)
        out, problems = {}, []
        for key, item in value.items():
            if slot is not None:
                if not (isinstance(key, str) and NAME.fullmatch(key)):
                    problems.append(Problem(str(key), "is no name", "letters, digits, _ and -, no digit first"))
                    continue
                item = {"use": key, **item} if isinstance(item, Mapping) else item
            out[key] = self._collect(str(key), item, inner, problems)
        if problems:
            raise RecipeError(problems)
        return out

    def _record(self, value: Any, cls: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _problem(f"expected a table, got {shown(value)}")
        known = options(cls)
        kinds = option_types(cls)
        noun = "option" if hasattr(cls, "__spalf__") else "key"
        problems = [
            Problem(str(key), f"unknown {noun}", self._inside(str(key), cls) or suggest(str(key), known, f"{noun}s"))
            for key in value
            if key not in known
        ]
        given: dict[str, Any] = {}
        for alias, a in known.items():
            if alias in value:
                before = len(problems)
                item = self._collect(alias, value[alias], kinds[a.name], problems)
                if len(problems) == before:
                    given[alias] = item
            elif a.default is attrs.NOTHING:
                problems.append(Problem(alias, "is required and missing"))
        if problems:
            raise RecipeError(problems + _invalid(cls, given))
        try:
            return cls(**given)
        except Exception as e:  # a validator may raise what it likes
            raise RecipeError(_invalid(cls, given) or [Problem("", " ".join(str(e).split()))]) from None

    def _inside(self, key: str, cls: type) -> str:
        """A hint where an unknown option is one of a component that an option of `cls` holds by default; else ""."""
        kinds = option_types(cls)
        for name, a in options(cls).items():
            slot, use = slot_of(kinds[a.name]), str(a.metadata.get("use"))
            is_known = slot is not None and use in self.registry.names(slot.name)
            if slot is not None and is_known and key in options(self.registry.resolve(slot.name, use)):
                return f'write "{name}.{key}": it is an option of {slot.name} "{use}"'
        return ""

    def _array(self, value: Any, kind: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise _problem(f"expected an array, got {shown(value)}")
        make, inner = get_origin(kind) or kind, get_args(kind) or (Any,)
        if make is tuple and inner[-1] is not Ellipsis and get_args(kind):
            if len(value) != len(inner):
                raise _problem(f"expected {len(inner)} entries, got {len(value)}")
            kinds: Iterable[Any] = inner
        else:
            kinds = [inner[0]] * len(value)
        problems: list[Problem] = []
        items = [self._collect(f"[{i}]", x, k, problems) for i, (x, k) in enumerate(zip(value, kinds, strict=True))]
        if problems:
            raise RecipeError(problems)
        return make(items) if make in (list, frozenset, set) else tuple(items)

    def _union(self, value: Any, kind: Any) -> Any:
        """The member of the value's own type, or else the first that takes it."""
        members = sorted((m for m in get_args(kind) if m is not NoneType), key=lambda m: m is not type(value))
        nested = isinstance(value, dict | list)
        errors = []
        for member in [m for m in members if (m not in _SCALARS) == nested] or members:
            try:
                return self._conv.structure(value, member)
            except RecipeError as e:
                errors.append(e)
        if len(errors) == 1:
            raise errors[0]
        called = " or ".join(m.__name__ if m in _SCALARS else "a table or an array" for m in members)
        raise _problem(f"expected {called}, got {shown(value)}")

    def _collect(self, name: str, value: Any, kind: Any, problems: list[Problem]) -> Any:
        try:
            return self._conv.structure(value, kind)
        except RecipeError as e:
            problems += _below(name, e)
        except (TypeError, ValueError) as e:  # a hook of cattrs' own, for a type such as Path or an enum
            problems.append(Problem(name, f"{e}, got {shown(value)}"))
        return None

    def _table(self, x: Any) -> dict[str, Any]:
        ref = getattr(type(x), "__spalf__", None)
        out = {"use": ref.use} if isinstance(ref, ComponentRef) else {}
        for key, a in options(type(x)).items():
            value = getattr(x, a.name)
            if value is not None:
                out[key] = self.unstructure(value)
        return out


def _scalar(value: Any, kind: Any) -> Any:
    """Nothing is coerced, except int to float."""
    if kind is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) is not kind:
        raise _problem(f"expected {kind.__name__}, got {shown(value)}")
    if kind is int and not -(2**63) <= value < 2**63:
        raise _problem("does not fit into 64 bits")
    if kind is float and math.isnan(value):
        raise _problem("is not a number")
    return value


def _literal(value: Any, kind: Any) -> Any:
    allowed = get_args(kind)
    for item in allowed:
        if type(item) is type(value) and item == value:
            return item
    known = [a for a in allowed if isinstance(a, str)]
    hint = suggest(value, known) if isinstance(value, str) else ""
    message = f"must be one of {', '.join(map(plain, allowed))}, got {plain(value)}"
    raise _problem(message, hint if hint.startswith("did") else "")


def _invalid(cls: type, given: Mapping[str, Any]) -> list[Problem]:
    """What the validators of the given options say, each on its own: attrs itself stops at the first."""
    probe: Any = object.__new__(cls)
    named = {key: a for key, a in options(cls).items() if key in given}
    for key, a in named.items():
        object.__setattr__(probe, a.name, given[key])
    problems = []
    for key, a in named.items():
        try:
            if a.validator is not None:
                a.validator(probe, a, given[key])
        except AttributeError:
            continue  # it looks at an option that is left out, or wrong and hence listed already
        except Exception as e:
            problems.append(Problem(key, *complaint(e, a.name, given[key])))
    return problems


def _is(*bases: Any) -> Callable[[Any], bool]:
    """Whether a type is one of `bases`, bare or with parameters."""
    return lambda kind: (get_origin(kind) or kind) in bases


def _below(name: str, error: RecipeError) -> list[Problem]:
    """The problems of what is called `name`: name.option, name[0]."""

    def path(inner: str) -> str:
        dot = "." if name and inner and not inner.startswith("[") else ""
        return name + dot + inner

    return [attrs.evolve(p, path=path(p.path)) for p in error.problems]


def _problem(message: str, hint: str = "", path: str = "") -> RecipeError:
    return RecipeError([Problem(path, message, hint)])
