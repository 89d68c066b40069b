"""The commands that show what came of a run: its report and its features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from spalf.cli.arguments import Device, Json, RunArg, StateArg
from spalf.cli.numbers import scaled
from spalf.cli.terminal import note, show, write_json

Tokens = Annotated[
    int, typer.Option("--tokens", metavar="N", min=1, help="Held-out tokens that features are looked at on.")
]
Sort = Literal["density", "id", "stratum", "token", "focus", "peak", "likeness", "drift", "absorption"]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(epilog="Example: spalf report runs/quickstart --out quickstart.html")(report)
    app.command(epilog="Example: spalf features runs/quickstart --search import --sort focus --limit 10")(features)


def report(
    ctx: typer.Context,
    run_dir: RunArg,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to write; RUN/report.html.", show_default=False)
    ] = None,
    most: Annotated[
        int, typer.Option("--features", metavar="N", min=0, help="Features on the page at most; 0 needs no model.")
    ] = 4096,
    tokens: Tokens = 65_536,
    device: Device = "auto",
) -> None:
    """Write one page about a run: its course, its plan, its evaluation and its features.

    The page needs no other file and no network: it opens from disk in any browser.
    """
    from spalf.reporting import write_report

    if not ctx.obj.quiet:
        note(f"reading {run_dir} ...")
    path = write_report(run_dir, out, features=most, tokens=tokens, device=device)
    if not ctx.obj.quiet:
        note(f"wrote {path} ({scaled(path.stat().st_size, 'B', 1024)})")


def features(
    ctx: typer.Context,
    checkpoint: StateArg,
    number: Annotated[
        int | None, typer.Argument(metavar="ID", min=0, help="One feature, in full.", show_default=False)
    ] = None,
    search: Annotated[
        str, typer.Option("--search", metavar="TEXT", help="Only those that fire on, promote or show it.")
    ] = "",
    stratum: Annotated[str, typer.Option("--stratum", metavar="NAME", help="Only those of one stratum.")] = "",
    sort: Annotated[Sort, typer.Option("--sort", help="Most remarkable first.")] = "density",
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="Features shown at most.")] = 20,
    tokens: Tokens = 65_536,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """List a dictionary's features, or tell one in full: contexts, tokens that it promotes, neighbours, partners."""
    from spalf.report import find, words
    from spalf.report import search as lookup
    from spalf.reporting import features as look

    if not (ctx.obj.quiet or as_json):
        note(f"looking at {checkpoint} ...")
    atlas = look(checkpoint, tokens=tokens, device=device)
    if number is not None:
        told = words(atlas, find(atlas, number))
        if as_json:
            write_json(told)
        else:
            from spalf.cli.features import feature_parts

            show(*feature_parts(told, atlas))
        return
    found = lookup(atlas, search, stratum, sort)
    rows = [words(atlas, f) for f in found[:limit]]
    if as_json:
        write_json(rows)
        return
    from spalf.cli.features import feature_table

    show(feature_table(rows, sort))
    if not ctx.obj.quiet:
        note(f"{len(rows)} of {len(found)} features, of {atlas.width} in all; {atlas.silent} fired on no token")
