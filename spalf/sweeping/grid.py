"""The points of a sweep: every combination of the values that each key is given."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from attrs import field, frozen

from spalf.assembly import toml
from spalf.errors import Problem, RecipeError

SEED = "seed"
"""A key whose values are repetitions and no settings: points that differ in it alone are averaged."""


@frozen(kw_only=True)
class Point:
    """One combination: its name, which is its run's, and the settings that make it, by dotted key."""

    name: str
    settings: Mapping[str, Any] = field(hash=False)

    @property
    def sets(self) -> list[str]:
        """As `--set` takes them, the run's name included."""
        return [*(f"{key}={_text(value)}" for key, value in self.settings.items()), f'name="{self.name}"']

    @property
    def label(self) -> str:
        """What tells this point from others, repetitions apart: "R2_target 0.8"."""
        kept = {k: v for k, v in self.settings.items() if k != SEED} or self.settings
        return ", ".join(f"{key.rpartition('.')[2]} {shown(value)}" for key, value in kept.items())


def points(over: Sequence[str]) -> list[Point]:
    """The grid of "key=value,value,..." assignments, the last key varying fastest.

    A value is TOML, or else text, as in `--set`; a comma inside brackets or quotes belongs to its value. Raises
    RecipeError for an assignment without values, and for a key or a value that is given twice.
    """
    axes: dict[str, list[Any]] = {}
    for text in over:
        key, values = _axis(text)
        if key in axes:
            raise RecipeError([Problem(f"--over {key}", "is given twice", "write all values behind one --over")])
        axes[key] = values
    if not axes:
        raise RecipeError([Problem("--over", "is missing", "write --over knobs.R2_target=0.7,0.8")])
    short = {key: key.rpartition(".")[2] for key in axes}
    if len(set(short.values())) < len(short):
        short = {key: key for key in axes}
    found = []
    for combination in product(*axes.values()):
        settings = dict(zip(axes, combination, strict=True))
        name = "+".join(f"{short[key]}-{_plain(value)}" for key, value in settings.items())
        found.append(Point(name=name, settings=settings))
    alike = sorted({p.name for p in found if sum(q.name == p.name for q in found) > 1})
    if alike:
        raise RecipeError([Problem("--over", f"gives {alike[0]} twice", "give every value once")])
    return found


def shown(value: Any) -> str:
    """A value as a person writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {shown(v)}" for k, v in value.items()) + "}"
    return str(value)


def _axis(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not values.strip():
        raise RecipeError(
            [Problem(f"--over {text}", "is not key=value,value,...", "write --over knobs.R2_target=0.7,0.8")]
        )
    pieces = _pieces(values)
    if not all(pieces):
        raise RecipeError([Problem(f"--over {text}", "has an empty value", "write one value between two commas")])
    return key.strip(), [_leaf(toml.setting(f"{key}={piece}"), key) for piece in pieces]


def _leaf(table: Any, key: str) -> Any:
    """What stands at a dotted key."""
    for name in key.split("."):
        table = table[name.strip()]
    return table


def _pieces(text: str) -> list[str]:
    """Split at commas that stand in no bracket and no quotation."""
    out, piece, depth, quote = [], "", 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c in "[{":
            depth += 1
        elif c in "]}":
            depth -= 1
        if c == "," and depth == 0 and not quote:
            out.append(piece.strip())
            piece = ""
        else:
            piece += c
    return [*out, piece.strip()]


def _text(value: Any) -> str:
    """A value as TOML, for `--set`."""
    if isinstance(value, str):
        return toml.write({"v": value}).partition("=")[2].strip()
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_text(v)}" for k, v in value.items()) + "}"
    return shown(value)


def _plain(value: Any) -> str:
    """A value as it may stand in a run's name; a number keeps its sign."""
    text = re.sub(r"[^\w.+-]+", "-", shown(value), flags=re.ASCII)
    return text if isinstance(value, int | float) else text.strip("-") or "-"
