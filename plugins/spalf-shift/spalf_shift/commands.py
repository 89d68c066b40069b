"""`spalf shift`: labelled sentences, and the study of what training on shifts is worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from spalf_shift.study import Row

shift = typer.Typer(add_completion=False, no_args_is_help=True, help="Sparse codes of activation differences.")


@shift.command(epilog="Example: spalf shift sentences pairs.jsonl --groups 1000")
def sentences(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A file to write, JSON lines.", show_default=False)],
    groups: Annotated[int, typer.Option("--groups", min=1, help="Sentences that others are paired with.")] = 1000,
    variants: Annotated[int, typer.Option("--variants", min=1, help="Pairs of each, before mirroring.")] = 2,
    most: Annotated[int, typer.Option("--most", min=1, help="Concepts that a pair changes, at most.")] = 3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same file for the same number.")] = 0,
) -> None:
    """Write pairs of Python snippets that differ in 1 to --most of 16 known concepts, each with its mirror image.

    spalf harvest RECIPE DIR --pairs OUT turns them into activations.
    """
    from spalf_shift.sentences import text_pairs, write_text

    pairs = text_pairs(groups, variants=variants, most=most, seed=seed)
    write_text(out, pairs)
    typer.echo(f"wrote {len(pairs)} pairs to {out}", err=True)


@shift.command(epilog="Example: spalf shift study --seeds 3")
def study(
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Trainings of each method.")] = 3,
    groups: Annotated[int, typer.Option("--groups", min=20, help="Groups of sentences; four pairs each.")] = 1500,
    position: Annotated[
        Literal["mean", "last"], typer.Option("--position", help="Of a sentence's tokens: their mean, or the last.")
    ] = "mean",
    recipe: Annotated[
        str,
        typer.Option("--recipe", metavar="RECIPE", help="Of another language model.", show_default=False),
    ] = "",
    only: Annotated[
        list[str], typer.Option("--only", metavar="NAME", help="A method; repeatable.", show_default=False)
    ] = [],  # noqa: B006
    sets: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="In every training recipe.", show_default=False)
    ] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Write every number as JSON to stdout.")] = False,
) -> None:
    """Do differences identify concepts better? Train every method on the same sentences, and print the table.

    Minutes on one core. Rows come as they are measured; numbers are means over seeds with 95 % intervals.
    """
    from spalf_shift import study as module

    def tell(line: str) -> None:
        typer.echo(line, err=True)

    source = recipe or str(module.RECIPES / "embedded.toml")
    pairs = module.harvested(source, position, groups, tell)
    rows = list(module.study(pairs, seeds, only=only, sets=sets, tell=tell))
    if as_json:
        typer.echo(json.dumps(module.as_json(rows), indent=2, allow_nan=False))
    elif rows:
        _show(rows, pairs.a_ND.shape[1])


def _show(rows: Sequence[Row], d_model: int) -> None:
    """The table as markdown, then the floors."""
    from spalf_shift import study as module

    heads, *body = module.table(rows)
    for line in (heads, ["---", *("---:" for _ in heads[1:])], *body):
        typer.echo(f"| {' | '.join(line)} |")
    floors = module.floors(rows)
    typer.echo(
        f"\nfloors: (c) permuted labels {floors['c_permuted']:.3f}, random directions {floors['c_random']:.3f}; "
        f"(b) random rows {floors['b_signed_random']:.3f}; (a) random dictionaries "
        f"{module.floor_of_consistency(module.FEATURES, d_model):.3f}; steering by random directions "
        f"{floors['steering.accuracy_random']:.3f}; probes on real activations {floors['steering.probe']:.3f}"
    )
