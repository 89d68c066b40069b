"""Commands of the plugin; each one imports what it needs when it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

pam = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@pam.callback()
def root() -> None:
    """PAM-SGD: the decoder in closed form (arXiv 2505.11836)."""


@pam.command(epilog="Example: nice spalf pam study --data digits --seeds 1")
def study(
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="NAME", help="digits, language or mnist; repeatable.", show_default=False),
    ] = ["digits", "language"],  # noqa: B006
    mnist: Annotated[
        Path | None, typer.Option("--mnist", metavar="DIR", help="MNIST's IDX files.", show_default=False)
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Fits per cell of a table.")] = 3,
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=100, help="Training rows in all.")] = 1138,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Encoder steps of a fit.")] = 300,
    as_json: Annotated[bool, typer.Option("--json", help="Write every fit as JSON to stdout.")] = False,
) -> None:
    """Compare PAM with joint gradient descent on little data and on more; prints two tables in Markdown.

    Features are 45 % of the rows. The second table's fits take twice as many steps.
    """
    from attrs import asdict, evolve

    from spalf_pam.study import load
    from spalf_pam.study.fit import Settings
    from spalf_pam.study.tables import frontier, frontier_table, sweep, sweep_table

    begin = time.process_time()
    settings = Settings(features=max(2, round(0.45 * rows)), steps=steps)
    found = [load(name, rows, mnist) for name in data]
    swept = [cell for one in found for cell in sweep(one, settings, seeds, _note)]
    longer = evolve(settings, steps=2 * steps)
    at_equal_error = [cell for one in found for cell in frontier(one, longer, seeds, _note)]
    if as_json:
        both = {"sweep": swept, "frontier": at_equal_error}
        typer.echo(json.dumps({name: [asdict(cell) for cell in cells] for name, cells in both.items()}, indent=2))
    else:
        typer.echo(f"{sweep_table(swept)}\n\n{frontier_table(at_equal_error)}")
    _note(f"{time.process_time() - begin:.0f} s of processor time")


def _note(message: str) -> None:
    typer.echo(message, err=True)
