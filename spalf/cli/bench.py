"""The group of benchmarks. Each command of it has a module of its own."""

from __future__ import annotations

import typer

bench = typer.Typer(
    help="Measure spalf beside the libraries that do the same.", rich_markup_mode=None, no_args_is_help=True
)


def add_to(app: typer.Typer) -> None:
    """Add the group, with every command that registers itself on `bench`."""
    app.add_typer(bench, name="bench")
