"""While a run starts nothing is searched for cycles; from its first step on everything new is, whatever comes."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from spalf.cli.startup import unsearched


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    was_on = gc.isenabled()
    yield
    gc.unfreeze()
    (gc.enable if was_on else gc.disable)()


def searched(thing: object) -> bool:
    """Whether the search walks a thing: `gc.get_objects` leaves out what is frozen."""
    return any(other is thing for other in gc.get_objects())


def test_the_search_begins_at_the_first_step_and_spares_what_was_there() -> None:
    gc.enable()
    there: list[object] = []
    with unsearched() as settled:
        assert not gc.isenabled()
        assert searched(there)
        settled.spalf_stepped()
        assert gc.isenabled()
        assert not searched(there)
        made: list[object] = []
        settled.spalf_stepped()
        assert searched(made), "what a run makes is searched"
        assert not searched(there)
    assert gc.isenabled()


def test_a_start_that_fails_leaves_the_search_on() -> None:
    gc.enable()
    with pytest.raises(ValueError, match="no such thing"), unsearched():
        raise ValueError("no such thing")
    assert gc.isenabled()


def test_a_search_that_was_off_stays_off() -> None:
    gc.disable()
    with unsearched() as settled:
        settled.spalf_stepped()
        assert not gc.isenabled()
    assert not gc.isenabled()
