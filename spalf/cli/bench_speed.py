"""`spalf bench speed`: the time of a whole training step, ours and other libraries'."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spalf.cli.arguments import Device, Sets
from spalf.cli.terminal import note, show

if TYPE_CHECKING:
    from rich.console import RenderableType

Shapes = Annotated[
    list[str],
    typer.Option("--shape", metavar="D,F,L0", help="d_model, features, active ones; repeatable.", show_default=False),
]
Kernels = Annotated[
    str,
    typer.Option("--kernels", metavar="LIST", help="NAME or NAME:option=value, by commas.", show_default=False),
]
Peers = Annotated[
    Path | None,
    typer.Option(
        "--peers", metavar="PYTHON", help="An interpreter that has them; .venv/peers/bin/python.", show_default=False
    ),
]
Axes = Annotated[
    list[str],
    typer.Option("--scaling", metavar="AXIS", help="F, l0, batch, corners or all; repeatable.", show_default=False),
]
Files = Annotated[
    list[Path],
    typer.Option("--from", metavar="FILE", help="Measure nothing, read these; repeatable.", show_default=False),
]


VERDICT = {True: "met", False: "missed", None: "not measured"}


def add_to(group: typer.Typer) -> None:
    """Add the command of this module."""
    group.command(epilog="Example: spalf bench speed --shape 2048,65536,64 --ceilings --json speed.json")(speed)


def speed(
    ctx: typer.Context,
    shapes: Shapes = [],  # noqa: B006
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Rows a step.", show_default=False)] = None,
    recipe: Annotated[str, typer.Option("--recipe", metavar="RECIPE", help="Whose step is ours.")] = "spalf",
    sets: Sets = [],  # noqa: B006
    kernels: Kernels = "",
    dtype: Annotated[
        Literal["auto", "fp32", "tf32", "bf16"], typer.Option("--dtype", help="The peers' precision.")
    ] = "auto",
    peers: Peers = None,
    without_peers: Annotated[bool, typer.Option("--no-peers", help="Ours alone.")] = False,
    only: Annotated[str, typer.Option("--only", metavar="GLOBS", help="Rows whose name matches, by commas.")] = "*",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps of each row.")] = 20,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Times that all rows take turns.")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=0, help="Of a CPU; 0: as torch chooses.")] = 0,
    ceilings: Annotated[bool, typer.Option("--ceilings", help="The chip's limits, and floors at them.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Time by kernel, of the first backend.")] = False,
    share: Annotated[bool, typer.Option("--share", help="What constraints cost; waits for the device.")] = False,
    start: Annotated[bool, typer.Option("--start", help="Start-up: the help, the recipe's first step.")] = False,
    scaling: Axes = [],  # noqa: B006
    commit: Annotated[str, typer.Option("--commit", metavar="NAME", help="Recorded; the tree's own.")] = "",
    device: Device = "auto",
    write: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Keep all figures here.", show_default=False)
    ] = None,
    read: Files = [],  # noqa: B006
    render: Annotated[
        Path | None, typer.Option("--render", metavar="PAGE", help="Write them as Markdown.", show_default=False)
    ] = None,
    remarks: Annotated[
        Path | None, typer.Option("--remarks", metavar="FILE", help="Markdown for that page.", show_default=False)
    ] = None,
) -> None:
    """Time whole training steps: ours by kernel backend, and those of SAELens, dictionary_learning and sparsify.

    A library that is not installed, or does not fit into memory, is a row with the reason. `make peers` installs them.
    """
    from spalf.bench.speed.command import run_or_read, written

    documents = run_or_read(ctx.params, (lambda text: None) if ctx.obj.quiet else note)
    if render is not None:
        written(render, documents, remarks)
    if not ctx.obj.quiet:
        show(*(part for document in documents for part in _parts(document)))
        for path in (write if not read else None, render):
            if path is not None:
                note(f"wrote {path}")


def _parts(document: dict[str, Any]) -> Iterator[RenderableType]:
    """What a document says, for the terminal."""
    from rich.text import Text

    from spalf.bench.speed import figures, tables

    m = document["machine"]
    yield Text(f"{m['device']}, {m['threads']} thread(s), torch {m['torch']}, {m['date']}, commit {m['commit']}")
    for table in document["shapes"]:
        s = table["shape"]
        yield _table(tables.steps(table["rows"]), f"\nd {s['d']}, F {s['F']}, L0 {s['l0']}, batch {s['batch']}")
        if "floors" in table:
            yield _table(tables.floors(table["floors"], figures.best(table["rows"], ours=True)), "\nfloors, calculated")
        if "ceilings" in table:
            yield _table(tables.ceilings(table["ceilings"]), "\nceilings, measured")
        for part in figures.apart(table):
            if "share" in part:
                yield _table(tables.shares(part["share"]["rows"]), f"\nwhat the constraints of {part['recipe']} cost")
            if part.get("profile", {}).get("status") == "ok":
                yield _table(tables.profile(part["profile"]["rows"]), f"\nprofile of {part['recipe']}")
    if document["scaling"]:
        yield _table(tables.scaling(document["scaling"]), "\nscaling")
    if "start" in document:
        yield _table(tables.start(document["start"]), "\nstart-up")
    goals = [(g.what, g.wanted, g.measured, VERDICT[g.met]) for g in figures.targets(document)]
    if goals:
        yield _table((["target", "wanted", "measured", ""], goals), "\ntargets")


def _table(parts: tuple[Sequence[str], Iterable[Sequence[str]]], title: str) -> RenderableType:
    from spalf.cli.render import plain_table

    heads, rows = parts
    return plain_table(heads, rows, title=title)
