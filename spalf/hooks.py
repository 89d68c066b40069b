"""The hooks. A specification's docstring is its documentation.

Hooks observe, components decide numbers: no hook returns a value that training uses, so installing a logger cannot
change a result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:  # the command line reads this module before torch is wanted
    from spalf.core.recipe import Plan
    from spalf.core.values import Reading

hookspec = pluggy.HookspecMarker("spalf")
hookimpl = pluggy.HookimplMarker("spalf")


def manager() -> pluggy.PluginManager:
    """A manager that knows these hooks, and no plugin yet."""
    fresh = pluggy.PluginManager("spalf")
    fresh.add_hookspecs(sys.modules[__name__])
    return fresh


@hookspec
def spalf_components() -> list[type]:  # type: ignore[empty-body]
    """Return the component classes this package offers. Called once, when the registry is built."""


@hookspec
def spalf_commands(app: Any) -> None:
    """Add commands to the command line; `app` is the `typer.Typer` of `spalf`."""


@hookspec
def spalf_trackers() -> dict[str, Callable[[Plan, Path], object]]:  # type: ignore[empty-body]
    """Return trackers by the name that `record.track` chooses them with.

    Each is called before a run begins, with its plan and its directory, and returns an observer: an object with any of
    the hooks below. It writes nothing before the first of them is called, and then under `<directory>/trackers/<name>`.
    What an observer raises ends its tracking, never the run; what is raised before ends the command.
    """


@hookspec
def spalf_phase_entered(run: Any, name: str) -> None:
    """A phase has been entered. Not called on resume. `run` is a `spalf.engine.run.Run`."""


@hookspec
def spalf_stepped(run: Any, reading: Reading) -> None:
    """A step has been taken. `reading.scalars()` waits for the device: call it rarely."""


@hookspec
def spalf_logged(run: Any, line: Mapping[str, Any], index: int) -> None:
    """A line has been written to metrics.jsonl, behind `index` others: plain numbers, every `record.log_every` steps.

    A resumed run counts on from the line that it was cut behind, so an index comes again where steps are taken again.
    """


@hookspec
def spalf_saved(run: Any, path: Path) -> None:
    """A checkpoint directory has been written, whole, at `path`."""


@hookspec
def spalf_ended(run: Any, summary: Mapping[str, Any]) -> None:
    """The run has ended and summary.json, which holds `summary`, is written: done, stopped, diverged or failed."""
