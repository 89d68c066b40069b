"""Start-up without the search for reference cycles: it walks all objects there are, and imports make half a million."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from spalf.hooks import hookimpl


class Settled:
    """Turns the search on at the first step of a run, and spares it what was made before: modules stay."""

    def __init__(self, *, is_settled: bool) -> None:
        self._is_settled = is_settled

    @hookimpl
    def spalf_stepped(self) -> None:
        if not self._is_settled:
            gc.freeze()
            gc.enable()
            self._is_settled = True


@contextmanager
def unsearched() -> Iterator[Settled]:
    """Inside, objects are not searched for cycles until the observer that it gives has seen a step.

    Where the caller has turned the search off, it stays off.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield Settled(is_settled=not was_on)
    finally:
        if was_on:
            gc.enable()
