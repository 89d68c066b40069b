"""Commands that take dictionaries to other libraries and bring them from there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from spalf.cli.arguments import Device, Json, Sets, StateArg
from spalf.cli.terminal import note, write_json


def add_to(app: typer.Typer) -> None:
    """Add `export` and `import` to the commands of `app`."""
    app.command(epilog="Example: spalf export runs/quickstart dictionaries/quickstart --to saelens")(export)
    app.command(
        "import",
        epilog="Example: spalf import sae --from saelens --out runs/sae --recipe recipes/quickstart.toml",
    )(import_)


def export(
    ctx: typer.Context,
    checkpoint: StateArg,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A directory to write into.", show_default=False)],
    to: Annotated[
        Literal["safetensors", "saelens", "dictionary_learning"],
        typer.Option("--to", help="Whose format; safetensors is spalf's own."),
    ] = "safetensors",
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option("--dtype", help="Of the written tensors.")
    ] = "float32",
    push: Annotated[
        str,
        typer.Option("--push", metavar="USER/NAME", help="Upload it there, with a model card.", show_default=False),
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    as_json: Json = False,
) -> None:
    """Write a dictionary that takes and gives raw activations: the whitening is folded in."""
    from spalf.exchange.verbs import export as write

    written = write(checkpoint, out, to=to, dtype=dtype, push=push, private=private)
    _tell(ctx, as_json, {"directory": written, "format": to, **({"pushed": push} if push else {})}, f"wrote {written}")
    if push and not (as_json or ctx.obj.quiet):
        note(f"pushed to {push}")


def import_(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The folder of a dictionary.", show_default=False)],
    form: Annotated[
        Literal["saelens", "dictionary_learning", "sparsify", "safetensors"],
        typer.Option("--from", help="Whose format; safetensors is what spalf export writes.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="The run directory to make.", show_default=False)],
    recipe: Annotated[
        str,
        typer.Option("--recipe", metavar="RECIPE", help="Whose source its activations come from.", show_default=False),
    ] = "",
    sets: Sets = [],  # noqa: B006
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", metavar="N", min=0, help="Activations to measure mean and scale on; 0 opens no model."
        ),
    ] = 16_384,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Make a run of another library's dictionary, for spalf eval and what else reads runs.

    Without --recipe the dictionary's own file says which model and hook it belongs to.
    """
    from spalf.exchange.verbs import import_dictionary

    written = import_dictionary(path, out, format=form, recipe=recipe, sets=sets, tokens=tokens, device=device)
    _tell(ctx, as_json, {"directory": written, "format": form}, f"wrote {written}")


def _tell(ctx: typer.Context, as_json: bool, told: dict[str, Any], line: str) -> None:
    if as_json:
        write_json(told)
    elif not ctx.obj.quiet:
        note(line)
