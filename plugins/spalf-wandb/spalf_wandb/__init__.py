"""A plugin for spalf: the tracker `wandb`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from spalf import Plan, hookimpl

__all__ = ["spalf_trackers"]


def _wandb(plan: Plan, directory: Path) -> object:
    """The tracker of a run in `directory`. The client is imported here: it takes a second that other commands save."""
    from spalf_wandb.tracker import Wandb

    return Wandb(plan, directory)


@hookimpl
def spalf_trackers() -> dict[str, Callable[[Plan, Path], object]]:
    """What this package offers."""
    return {"wandb": _wandb}
