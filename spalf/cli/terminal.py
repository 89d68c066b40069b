"""Where output goes: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PIPED_WIDTH = 120


def console(*, stderr: bool = False) -> Console:
    """A console that takes text as it is: no markup, no highlighting; wide where the output is not a terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else PIPED_WIDTH
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=width)


def show(*parts: RenderableType) -> None:
    """Write renderables to stdout, one below the other."""
    out = console()
    for part in parts:
        out.print(part)


def write_json(value: Any) -> None:
    """Write strict JSON to stdout; NaN and infinities become null."""
    from spalf.record import plain

    typer.echo(json.dumps(plain(value), indent=2, allow_nan=False))


def note(message: str) -> None:
    """One line for a person, on stderr."""
    typer.echo(message, err=True)
