"""Components, presets and plugins: what is listed, what is shown, and what a wrong name is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytest
import tomli
from attrs import validators
from typer.testing import Result

from spalf.assembly.registry import Registry
from spalf.cli.describe import bounds, type_text
from spalf.core.protocols import Gate, Source

Spalf = Callable[..., Result]


def words(told: Result) -> str:
    return " ".join(told.stdout.split())


def test_components_are_listed_by_slot(spalf: Spalf, offered: Registry) -> None:
    told = words(spalf("components", "list"))
    assert "whitener nothing acme 1.0 Leaves things as they are." in told
    assert "dual steady acme 1.0 Multipliers that never move [ever]." in told


def test_one_slot_alone(spalf: Spalf, offered: Registry) -> None:
    rows = json.loads(spalf("components", "list", "dual", "--json").stdout)
    assert rows == [
        {"slot": "dual", "name": "steady", "origin": "acme 1.0", "doc": "Multipliers that never move [ever]."}
    ]


def test_a_component_shows_its_options(spalf: Spalf, offered: Registry) -> None:
    told = words(spalf("components", "show", "dual", "steady"))
    assert 'dual "steady" acme 1.0' in told
    assert "Only for looking at." in told
    assert "rate float 0.1 > 0, < 1 How fast, were it to move." in told
    assert 'mode str "slow" one of slow, fast' in told
    assert "betas [float, float] [0.9, 0.999]" in told
    assert "target float knobs.R2_target" in told


def test_a_component_as_json(spalf: Spalf, offered: Registry) -> None:
    shown = json.loads(spalf("components", "show", "dual", "steady", "--json").stdout)
    options = {o["name"]: o for o in shown["options"]}
    assert options["memory"] == {"name": "memory", "type": "int", "default": 0, "bounds": ">= 0", "doc": ""}
    assert options["target"]["from"] == "knobs.R2_target"
    assert "default" not in options["target"]
    assert shown["doc"] == "Multipliers that never move [ever].\n\nOnly for looking at."


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("components list dul", 'no slot is called "dul" (did you mean "dual"?)'),
        ("components show dul steady", 'no slot is called "dul" (did you mean "dual"?)'),
        ("components show dual stedy", 'no dual is called "stedy" (did you mean "steady"?)'),
        ("presets show spalff", 'no preset is called "spalff" (did you mean "spalf"?)'),
    ],
)
def test_a_wrong_name_is_told_the_nearest(spalf: Spalf, offered: Registry, command: str, told: str) -> None:
    result = spalf(*command.split())
    assert result.exit_code == 2
    assert told in result.stderr


def test_presets_are_listed_and_shown_as_they_stand(spalf: Spalf) -> None:
    names = [row["name"] for row in json.loads(spalf("presets", "list", "--json").stdout)]
    assert "spalf" in names
    for name in names:
        assert tomli.loads(spalf("presets", "show", name).stdout)
        assert name in spalf("presets", "list").stdout


def test_plugins_are_listed_with_what_they_give(spalf: Spalf, offered: Registry) -> None:
    assert json.loads(spalf("plugins", "list", "--json").stdout) == [
        {
            "name": "stub",
            "origin": "stub 1.0",
            "components": ["dual.steady", "whitener.nothing"],
            "hooks": ["spalf_components"],
        }
    ]
    assert "stub stub 1.0 dual.steady, whitener.nothing spalf_components" in words(spalf("plugins", "list"))


def even(instance: Any, attribute: Any, value: Any) -> None:
    """even."""


@pytest.mark.parametrize(
    ("validator", "text"),
    [
        (None, ""),
        (validators.ge(2), ">= 2"),
        (validators.and_(validators.gt(0.0), validators.le(0.5)), "> 0, <= 0.5"),
        (validators.in_(["a", "b"]), "one of a, b"),
        (validators.optional(validators.lt(3)), "< 3"),
        (validators.deep_iterable(validators.gt(0), validators.min_len(1)), "each > 0"),
        (validators.min_len(2), "length >= 2"),
        (even, "even"),
    ],
)
def test_bounds_are_read_from_validators(validator: Any, text: str) -> None:
    assert bounds(validator) == text


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (int, "int"),
        (Literal["raw", "white"], '"raw" | "white"'),
        (float | None, "float | none"),
        (tuple[str, ...], "array of str"),
        (tuple[float, float], "[float, float]"),
        (Mapping[str, int], "table of int"),
        (Gate[Any], "a gate"),
        (Source, "a source"),
    ],
)
def test_types_are_told_in_the_words_of_a_recipe(kind: Any, text: str) -> None:
    assert type_text(kind) == text
