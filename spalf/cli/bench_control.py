"""`spalf bench control`: laws of multipliers on problems whose multipliers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spalf.cli.terminal import note, show

if TYPE_CHECKING:
    from spalf.bench.control import Row


def add_to(group: typer.Typer) -> None:
    """Add the command of this module."""
    group.command(epilog="Example: spalf bench control --seeds 2 --json control.jsonl")(control)


def control(
    ctx: typer.Context,
    seeds: Annotated[int, typer.Option("--seeds", min=2, help="Noise seeds per problem.")] = 2,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="A line per law, options and problem.", show_default=False),
    ] = None,
) -> None:
    """Compare laws that move multipliers, each at its best gains, on sixteen problems. Two minutes on one core."""
    import torch

    from spalf.bench.control import compare
    from spalf.record import write_whole

    torch.set_num_threads(1)
    found = compare(seeds=seeds, tell=None if ctx.obj.quiet else note)
    if json_file is not None:
        rows = (*found.rows, *found.picks, *found.summary)
        write_whole(json_file, "".join(json.dumps(_plain(row)) + "\n" for row in rows))
    if not ctx.obj.quiet:
        from spalf.cli.render import plain_table

        heads = ["law", "options", "settling", "overshoot", "error", "noise", "end", "score"]
        right = tuple(range(2, len(heads)))
        for title in ("all", "held back"):
            cells = [_cells(row, f"{row.law}, {row.chosen}") for row in found.summary if row.problem == title]
            name = "all problems" if title == "all" else "the problems at odd places, which no gain was tuned on"
            show(plain_table(heads, cells, title=name, right=right))
        heads[0] = "problem"
        for law, way in dict.fromkeys((row.law, row.chosen) for row in found.picks):
            if way != "per problem":
                cells = [_cells(r, r.problem) for r in found.picks if (r.law, r.chosen) == (law, way)]
                show(plain_table(heads, cells, title=f"{law}, {way}", right=right))


def _cells(row: Row, name: str) -> list[str]:
    options = ", ".join(f"{key} {value:g}" for key, value in row.options.items()) or "-"
    m = row.measures
    shares = [f"{m[key]:.3f}" for key in ("overshoot", "error", "noise")]
    return [name, options, f"{m['settling']:.0f}", *shares, f"{m['end']:.4f}", f"{row.score:.2f}"]


def _plain(row: Row) -> dict[str, object]:
    from spalf.record import plain

    out: dict[str, object] = plain(
        {
            "law": row.law,
            "options": dict(row.options),
            "chosen": row.chosen,
            "problem": row.problem,
            "score": row.score,
            **row.measures,
        }
    )
    return out
