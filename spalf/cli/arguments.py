"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArg = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a preset.", show_default=False)
]
RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]
StateArg = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run: its newest one.", show_default=False)
]
Sets = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the recipe; repeatable.", show_default=False),
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="Where to compute: cpu, cuda, cuda:1.")]
StopAt = Annotated[
    int | None, typer.Option("--stop-at", metavar="STEP", min=1, help="Save and stop at this step.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")]
Feature = Annotated[int, typer.Option("--feature", metavar="ID", min=0, help="A feature's id.", show_default=False)]
