"""The five hooks. A specification's docstring is its documentation.

Hooks observe, components decide numbers: no hook returns a value that training uses, so installing a logger cannot
change a result.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:  # the command line reads this module before torch is wanted
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
def spalf_phase_entered(run: Any, name: str) -> None:
    """A phase has been entered. Not called on resume. `run` is a `spalf.engine.run.Run`."""


@hookspec
def spalf_stepped(run: Any, reading: Reading) -> None:
    """A step has been taken. `reading.scalars()` waits for the device: call it rarely."""


@hookspec
def spalf_saved(run: Any, path: Path) -> None:
    """A checkpoint directory has been written, whole, at `path`."""
