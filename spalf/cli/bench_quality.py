"""The command that trains a suite of dictionaries, ours and other libraries'."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spalf.cli.arguments import Device, Json, Sets
from spalf.cli.terminal import note, write_json

if TYPE_CHECKING:
    from spalf.bench.queue import Outcome


def add_to(group: typer.Typer) -> None:
    """Add the command of this module."""
    group.command(epilog="Example: spalf bench quality recipes/bench/tiny.toml --jobs 2 --render bench/tiny.md")(
        quality
    )


def quality(
    ctx: typer.Context,
    suite: Annotated[Path, typer.Argument(metavar="SUITE", help="A suite file.", show_default=False)],
    only: Annotated[str, typer.Option("--only", metavar="GLOBS", help="Jobs whose name matches, by commas.")] = "*",
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", min=1, help="How many work at once on each device.")] = 1,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            metavar="M",
            min=0.0,
            help="Start nothing that would not fit, and cut what is not done then. 0 renders only.",
            show_default=False,
        ),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(
            "--peers", metavar="PYTHON", help="Interpreter with the peers; .venv/peers/bin/python.", show_default=False
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where results are; bench/SUITE.", show_default=False),
    ] = None,
    render: Annotated[
        Path | None,
        typer.Option("--render", metavar="PAGE", help="Write tables and plots to this page.", show_default=False),
    ] = None,
    sets: Sets = [],  # noqa: B006
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a suite of dictionaries, ours and other libraries', on one stream, and measure all alike.

    The same command goes on where it was stopped: every job that is done is a line of DIR/results.jsonl, and files
    results*.jsonl of other visits count once they lie beside it. Exit code 1 where a job has failed.
    """
    from spalf.bench.quality import quality as work

    quiet: bool = ctx.obj.quiet
    outcome, directory = work(
        suite,
        sets=sets,
        only=only,
        jobs=jobs,
        minutes=minutes,
        peers=peers,
        out=out,
        page=render,
        device=device,
        tell=(lambda text: None) if quiet else note,
    )
    if as_json:
        write_json({"directory": directory, "done": outcome.done, "failed": outcome.failed, "left": outcome.left})
    if not quiet:
        _tell(outcome, directory, render)
    if outcome.failed:
        raise typer.Exit(1)


def _tell(outcome: Outcome, directory: Path, page: Path | None) -> None:
    """How far the queue is, and why the rest is left."""
    count = len(outcome.done) + len(outcome.failed) + len(outcome.left)
    note(f"{len(outcome.done)} of {count} jobs done, {len(outcome.failed)} failed: {directory / 'results.jsonl'}")
    for reason in dict.fromkeys(outcome.left.values()):
        held = [name for name, why in outcome.left.items() if why == reason]
        note(f"left, {reason}: {len(held)}, such as {held[0]}")
    if page is not None:
        note(f"wrote {page}")
