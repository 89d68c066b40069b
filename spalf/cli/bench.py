"""The group of benchmarks. Each command of it has a module of its own."""

from __future__ import annotations

import typer

from spalf.cli import bench_control, bench_harvest, bench_quality, bench_speed

bench = typer.Typer(
    help="Measure spalf beside the libraries that do the same.", rich_markup_mode=None, no_args_is_help=True
)


bench_control.add_to(bench)
bench_harvest.add_to(bench)
bench_quality.add_to(bench)
bench_speed.add_to(bench)


def add_to(app: typer.Typer) -> None:
    """Add the group, with every command that registers itself on `bench`."""
    app.add_typer(bench, name="bench")
