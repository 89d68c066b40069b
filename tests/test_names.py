"""One word per thing: slot = module = recipe key = decorator = protocol = test = page."""

import re
from pathlib import Path

import attrs
import pytest

import spalf
from spalf.assembly.options import option_types, slot_of
from spalf.core import protocols, slots
from spalf.core.recipe import Recipe
from spalf.core.slots import SLOTS, ComponentRef, label
from spalf.plugins import registry

ROOT = Path(__file__).resolve().parent.parent
PARTS = ROOT / "spalf" / "parts"
each_slot = pytest.mark.parametrize("name", SLOTS)
SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def modules() -> set[str]:
    return {p.stem for p in PARTS.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - {"__init__"}


def shipped() -> dict[ComponentRef, type]:
    known = registry()
    return {ref: known.resolve(ref.slot, ref.use) for ref in known if known.origin(ref).split()[0] == "spalf"}


def test_sixteen() -> None:
    assert len(SLOTS) == 16


def test_modules() -> None:
    assert modules() == set(SLOTS)


def test_tests() -> None:
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "tests" / "parts").glob("test_*.py")}
    assert set(SLOTS) - tests == set()


def test_pages() -> None:
    assert {p.stem for p in (ROOT / "docs" / "parts").glob("*.md")} == set(SLOTS)


@each_slot
def test_decorator(name: str) -> None:
    decorator = getattr(slots, name)
    assert getattr(spalf, name) is decorator
    assert name in spalf.__all__
    assert decorator.__name__ == name


@each_slot
def test_protocol(name: str) -> None:
    assert SLOTS[name].name == name
    assert SLOTS[name].protocol is getattr(protocols, name.capitalize())


@each_slot
def test_key(name: str) -> None:
    """A field of the recipe; an inner slot is an option of some component, under its own name."""
    if SLOTS[name].form != "inner":
        assert name in attrs.fields_dict(Recipe)
        return
    homes = [cls for cls in shipped().values() if any(slot_of(t) is SLOTS[name] for t in option_types(cls).values())]
    assert homes
    assert all(slot_of(option_types(cls)[name]) is SLOTS[name] for cls in homes)


@each_slot
def test_components_live_in_their_slots_module(name: str) -> None:
    mine = {ref: cls for ref, cls in shipped().items() if ref.slot == name}
    assert mine, f"spalf ships no {name}"
    for ref, cls in mine.items():
        assert label(cls) == ref
        assert (cls.__module__ + ".").startswith(f"spalf.parts.{name}."), cls


def test_a_component_and_its_class_share_a_name() -> None:
    unlike = {
        ref.use: cls.__name__ for ref, cls in shipped().items() if ref.use.replace("_", "") != cls.__name__.lower()
    }
    assert unlike == {}


def test_snake_case() -> None:
    names = {ref.use for ref in shipped()} | {a.name for cls in shipped().values() for a in attrs.fields(cls)}
    assert [name for name in sorted(names) if not SNAKE.fullmatch(name)] == []
