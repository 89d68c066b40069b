"""The commands that train and measure. Each one imports what it needs when it runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from attrs import frozen

import spalf
from spalf.cli import bench, catalogue, exchange, intervene, look, measure, sweep
from spalf.cli.arguments import Device, Json, RecipeArg, RunArg, Sets, StopAt
from spalf.cli.group import Group
from spalf.cli.startup import unsearched
from spalf.cli.terminal import console, note, show, write_json

if TYPE_CHECKING:
    from spalf.launch import Result

app = typer.Typer(
    name="spalf",
    cls=Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.add_typer(catalogue.components, name="components")
app.add_typer(catalogue.presets, name="presets")
app.add_typer(catalogue.plugins, name="plugins")


@frozen
class Options:
    """The global flags."""

    quiet: bool = False


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        python = ".".join(str(n) for n in sys.version_info[:3])
        typer.echo(f"spalf {spalf.__version__} (python {python}, torch {version('torch')})")
        raise typer.Exit


@app.callback(epilog="Example: spalf run recipes/quickstart.toml --set knobs.R2_target=0.95")
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress, no closing table: errors and JSON only.")
    ] = False,
) -> None:
    """Train sparse autoencoders as constrained problems: name the targets, and the multipliers find the coefficients.

    Exit codes: 0 done (or stopped on request), 1 a run failed, 2 a recipe, an option or a file is to be mended.
    """
    ctx.obj = Options(quiet=quiet)


@app.command(epilog="Example: spalf run recipes/quickstart.toml --set budget.tokens=1_000_000 --out runs")
def run(
    ctx: typer.Context,
    recipe: RecipeArg,
    sets: Sets = [],  # noqa: B006
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the run's directory is made.")] = Path(
        "runs"
    ),
    device: Device = "auto",
    stop_at: StopAt = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run of the same name.")] = False,
    as_json: Json = False,
) -> None:
    """Train the dictionary that a recipe describes.

    Ctrl-C or SIGTERM saves a checkpoint after the step that is being taken; spalf resume goes on from it.
    """

    def launch(observers: list[object]) -> Result:
        from spalf.launch import run

        return run(recipe, sets=sets, out=out, device=device, stop_at=stop_at, force=force, observers=observers)

    _train(ctx, launch, as_json)


@app.command(epilog="Example: spalf resume runs/quickstart --set budget.tokens=2_000_000")
def resume(
    ctx: typer.Context,
    run_dir: RunArg,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="NAME", help="Which one; the newest.", show_default=False)
    ] = None,
    sets: Sets = [],  # noqa: B006
    device: Device = "auto",
    stop_at: StopAt = None,
    as_json: Json = False,
) -> None:
    """Go on with a run that was stopped; only record, budget.tokens, kernel and evaluators may be changed."""

    def launch(observers: list[object]) -> Result:
        from spalf.launch import resume

        return resume(run_dir, checkpoint=checkpoint, sets=sets, device=device, stop_at=stop_at, observers=observers)

    _train(ctx, launch, as_json)


def _train(ctx: typer.Context, launch: Callable[[list[object]], Result], as_json: bool) -> None:
    """Run with progress on stderr, then tell what came of it."""
    quiet: bool = ctx.obj.quiet
    with unsearched() as settled:
        if quiet:
            result = launch([settled])
        else:
            from spalf.cli.progress import progress

            with progress(console(stderr=True)) as observer:
                result = launch([observer, settled])
    if as_json:
        write_json(result.summary)
    elif not quiet and result.outcome == "done":
        from spalf.cli.render import example_lines, summary_parts

        show(*summary_parts(result.summary), *example_lines(result.examples))
    if not quiet:
        step = result.summary.get("step")
        note(f"{result.outcome}{'' if step is None else f' at step {step}'}: {result.directory}")
        if result.outcome == "stopped":
            note(f"go on with: spalf resume {shlex.quote(str(result.directory))}")
    if result.outcome == "diverged":
        raise typer.Exit(1)


@app.command("compile", epilog="Example: spalf compile recipes/pythia_1b.toml --set knobs.F=32768")
def compile_(
    recipe: RecipeArg,
    sets: Sets = [],  # noqa: B006
    form: Annotated[
        Literal["table", "toml", "json"],
        typer.Option("--format", help="A table for people, the filled recipe, or the whole plan."),
    ] = "table",
) -> None:
    """Print every derived number of a recipe with its formula and origin; builds no tensor."""
    from spalf import launch

    if form == "toml":
        typer.echo(launch.filled_text(recipe, sets), nl=False)
    elif form == "json":
        write_json(launch.compile_recipe(recipe, sets))
    else:
        from spalf.cli.render import plan_parts

        show(*plan_parts(launch.compile_recipe(recipe, sets)))


@app.command(epilog="Example: spalf harvest recipes/quickstart.toml shards --tokens 1000000 --format npy")
def harvest(
    ctx: typer.Context,
    recipe: RecipeArg,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A directory for the shards.", show_default=False)],
    sets: Sets = [],  # noqa: B006
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", metavar="N", min=1, help="Activations to write; budget.tokens.", show_default=False),
    ] = None,
    form: Annotated[Literal["safetensors", "npy"], typer.Option("--format", help="Of the shards.")] = "safetensors",
    pairs: Annotated[
        Path | None, typer.Option("--pairs", metavar="FILE", help="Paired texts to read instead.", show_default=False)
    ] = None,
    position: Annotated[
        Literal["last", "mean"], typer.Option("--position", help="Of a paired text's tokens: the last, or their mean.")
    ] = "last",
    device: Device = "auto",
) -> None:
    """Write the activations of a recipe's source to shards with a manifest, for the source "activations".

    With --pairs, those of paired texts (JSON lines with "a", "b" and "labels", .tsv or .csv), for the source
    "difference".
    """
    from spalf.launch import harvest as write

    path = write(recipe, out, sets=sets, tokens=tokens, format=form, pairs=pairs, position=position, device=device)
    _wrote(ctx, path)


def _wrote(ctx: typer.Context, path: Path) -> None:
    if not ctx.obj.quiet:
        note(f"wrote {path}")


bench.add_to(app)
exchange.add_to(app)
intervene.add_to(app)
look.add_to(app)
measure.add_to(app)
sweep.add_to(app)
