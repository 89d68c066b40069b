"""The commands that measure runs: eval and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spalf.cli.arguments import Device, Json, Sets, StateArg
from spalf.cli.terminal import note, show, write_json

Suites = Annotated[
    list[str],
    typer.Option("--suite", metavar="NAME", help="Only this evaluator; repeatable.", show_default=False),
]
RunArgs = Annotated[
    list[Path], typer.Argument(metavar="RUN", help="Two or more runs or checkpoints.", show_default=False)
]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("eval", epilog="Example: spalf eval runs/quickstart --suite downstream_loss --json")(evaluate)
    app.command(epilog="Example: spalf compare runs/quickstart runs/topk --suite downstream_loss")(compare)


def evaluate(
    ctx: typer.Context,
    checkpoint: StateArg,
    suites: Suites = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure a trained dictionary on text that training never saw, with 95 % intervals over documents.

    Without --suite: what the recipe declares, and every evaluator of spalf that its source can serve. The numbers are
    kept in RUN/evaluation.json.
    """
    from spalf.evaluation import evaluate as measure

    if not (ctx.obj.quiet or as_json):
        note(f"measuring {checkpoint} ...")
    scores = measure(checkpoint, suites=suites, sets=sets, device=device, keep=True)
    if as_json:
        write_json(scores)
    else:
        from spalf.cli.scores import score_table

        show(score_table(scores))


def compare(
    ctx: typer.Context,
    runs: RunArgs,
    suites: Suites = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Put runs side by side on the same held-out documents; * marks a difference that exceeds their noise.

    Measured by the evaluators of the first run's recipe, or by --suite. Noise is that of the documents: what another
    seed would have trained is not in it.
    """
    from spalf.evaluation import compare as side_by_side

    if not (ctx.obj.quiet or as_json):
        note(f"measuring {len(runs)} runs ...")
    compared = side_by_side(runs, suites=suites, sets=sets, device=device)
    if as_json:
        write_json(compared)
    else:
        from spalf.cli.scores import comparison_parts

        show(*comparison_parts(compared))
