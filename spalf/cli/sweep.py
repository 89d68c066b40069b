"""The command that trains a frontier."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spalf.cli.arguments import Device, Json, RecipeArg, Sets
from spalf.cli.terminal import console, note, show, write_json

if TYPE_CHECKING:
    from spalf.sweeping import Point, Sweep

Over = Annotated[
    list[str],
    typer.Option(
        "--over",
        metavar="KEY=V,V,...",
        help="Values of one key of the recipe; several --over make a grid, and seed=1,2 repeats it.",
        show_default=False,
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(epilog="Example: spalf sweep recipes/quickstart.toml --over knobs.R2_target=0.7,0.75,0.8")(sweep)


def sweep(
    ctx: typer.Context,
    recipe: RecipeArg,
    over: Over,
    sets: Sets = [],  # noqa: B006
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="One run per point below it; sweeps/NAME.", show_default=False),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a recipe at several values, and plot what they come to: DIR/results.jsonl and DIR/frontier.svg.

    The same command goes on where it was stopped: a finished point is not trained again.
    """
    from spalf.cli.progress import progress
    from spalf.sweeping import sweep as launch

    quiet: bool = ctx.obj.quiet

    def begin(point: Point, number: int, count: int, how: str) -> None:
        if not quiet:
            done = {"done": "is there", "resume": "goes on", "train": "is trained"}[how]
            note(f"point {number} of {count}: {point.name} {done}")

    with nullcontext() if quiet else progress(console(stderr=True)) as observer:
        watching = [] if observer is None else [observer]
        swept = launch(recipe, over=over, sets=sets, out=out, device=device, observers=watching, begin=begin)
    _tell(swept, quiet, as_json)


def _tell(swept: Sweep, quiet: bool, as_json: bool) -> None:
    """The table or JSON, where the files are, and exit code 1 where no point or not every one has ended well."""
    if as_json:
        write_json({"outcome": swept.outcome, "directory": swept.directory, "points": swept.rows})
    elif not quiet:
        from spalf.cli.scores import sweep_parts

        show(*sweep_parts(swept.rows))
    if not quiet:
        note(f"{swept.outcome}: {swept.directory / 'results.jsonl'}, {swept.directory / 'frontier.svg'}")
        if swept.outcome == "stopped":
            note("go on with the same command")
    if any(row["outcome"] != "done" for row in swept.rows):
        raise typer.Exit(1)
