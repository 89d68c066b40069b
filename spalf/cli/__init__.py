"""The command line. Only this package imports typer and rich, and its modules import torch inside commands only."""

from __future__ import annotations

from typing import NoReturn

from spalf.cli.app import app

__all__ = ["app", "main"]


def main() -> NoReturn:
    """The console script: exits with 0, 1 (a run failed) or 2 (the user's to mend)."""
    app()
    raise SystemExit(0)
