"""Reading a TOML table strictly: types, bounds and unknown keys, every mistake collected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

from spalf.assembly.hints import shown, suggest
from spalf.errors import Problem

T = TypeVar("T")


class _Required:
    """The default of a key that has none."""


REQUIRED: Final = cast(Any, _Required())


class Fields:
    """The keys of one table, each asked for once; `close` tells of those that nobody asked for."""

    def __init__(self, table: dict[str, Any], place: str, problems: list[Problem]) -> None:
        self._table, self._place, self.problems = table, place, problems
        self._asked: set[str] = set()

    def text(self, key: str, default: str) -> str:
        return self._get(key, default, "", lambda v: v if isinstance(v, str) else None, "a string")

    def texts(self, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        return self._get(key, default, (), lambda v: _array(v, _text), "an array of strings")

    def boolean(self, key: str, default: bool) -> bool:
        return self._get(key, default, default, lambda v: v if isinstance(v, bool) else None, "true or false")

    def integer(self, key: str, default: int, least: int = 0) -> int:
        said = f"a whole number of at least {least}"
        return self._get(key, default, least, lambda v: v if _is_integer(v) and v >= least else None, said)

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        return self._get(
            key, default, (), lambda v: _array(v, lambda e: e if _is_integer(e) else None), "whole numbers"
        )

    def number(self, key: str, default: float, low: float = 0.0, high: float = float("inf")) -> float:
        def check(value: Any) -> float | None:
            found = _number(value)
            return found if found is not None and low <= found <= high else None

        return self._get(key, default, low, check, f"a number from {low:g} to {high:g}")

    def numbers(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """Different, positive numbers; a single one may stand without brackets."""

        def check(value: Any) -> tuple[float, ...] | None:
            found = _array(value if isinstance(value, list) else [value], _number)
            ok = found is not None and found and len(set(found)) == len(found) and min(found) > 0
            return found if ok else None

        return self._get(key, default, (), check, "different positive numbers")

    def table(self, key: str, default: dict[str, Any]) -> dict[str, Any]:
        return self._get(key, default, {}, lambda v: v if isinstance(v, dict) else None, "a table")

    def tables(self, key: str) -> list[dict[str, Any]]:
        """The tables of an array; none where there is no such key."""
        every = lambda v: v if isinstance(v, list) and all(isinstance(e, dict) for e in v) else None  # noqa: E731
        return self._get(key, [], [], every, "an array of tables")

    def inner(self, key: str) -> Fields:
        """The fields of a table; without one, of an empty one."""
        return Fields(self.table(key, {}), self._path(key), self.problems)

    def optional(self, key: str) -> Fields | None:
        return self.inner(key) if key in self._table else None

    def under(self, key: str, name: str) -> Fields:
        """The fields of one named table."""
        held = self._table[key][name]
        place = f"{self._path(key)}.{name}"
        if not isinstance(held, dict):
            self.problems.append(Problem(place, f"expected a table, got {shown(held)}"))
            held = {}
        return Fields(held, place, self.problems)

    def wrong(self, key: str, message: str, hint: str = "") -> None:
        """One more problem."""
        self.problems.append(Problem(self._path(key), message, hint))

    def close(self) -> None:
        """Tell of every key that is not known."""
        for key in self._table:
            if key not in self._asked:
                self.wrong(key, "unknown key", suggest(key, self._asked))

    def _path(self, key: str) -> str:
        return f"{self._place}.{key}" if self._place else key

    def _get(self, key: str, default: T, fallback: T, check: Callable[[Any], T | None], said: str) -> T:
        self._asked.add(key)
        if key not in self._table:
            if default is REQUIRED:
                self.wrong(key, "is missing", f"write {said}")
                return fallback
            return default
        found = check(self._table[key])
        if found is None:
            self.wrong(key, f"expected {said}, got {shown(self._table[key])}")
            return fallback
        return found


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _array(value: Any, each: Callable[[Any], T | None]) -> tuple[T, ...] | None:
    """The elements that `each` makes; None where it is no array or one element is wrong."""
    if not isinstance(value, list):
        return None
    found = [each(element) for element in value]
    return None if any(element is None for element in found) else tuple(cast(list[T], found))
