"""The command line. Only this package imports typer and rich, and its modules import torch inside commands only."""

from __future__ import annotations

import gc
from typing import NoReturn

from spalf.cli.app import app

__all__ = ["app", "main"]


def main() -> NoReturn:
    """The console script: exits with 0, 1 (a run failed) or 2 (the user's to mend)."""
    try:
        app()
    finally:
        gc.freeze()  # the interpreter's last searches for cycles would walk all that is given back anyhow
    raise SystemExit(0)
