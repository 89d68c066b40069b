"""`spalf bench harvest`: the language model's passes, the training steps, and both together."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spalf.cli.arguments import Device, Json, RecipeArg, Sets
from spalf.cli.terminal import note, show, write_json

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {
    "harvest": "harvest alone",
    "steps": "training steps alone, activations resident",
    "both": "both, end to end",
}


def add_to(group: typer.Typer) -> None:
    """Add the command of this module."""
    group.command(epilog="Example: spalf bench harvest recipes/quickstart.toml --peers .venv/peers/bin/python")(harvest)


def harvest(
    ctx: typer.Context,
    recipe: RecipeArg,
    sets: Sets = [],  # noqa: B006
    device: Device = "auto",
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", min=1, help="Steps to measure, rounded up to whole blocks.")
    ] = 200,
    phase: Annotated[
        str, typer.Option("--phase", metavar="NAME", help="The phase to measure.", show_default="the first that trains")
    ] = "",
    random_model: Annotated[
        str,
        typer.Option(
            "--random-model",
            metavar="SHAPE",
            help="Random weights and text in place of the recipe's: pythia-70m, -160m, -1b, -1.4b.",
            show_default=False,
        ),
    ] = "",
    peers: Annotated[
        Path | None,
        typer.Option(
            "--peers", metavar="PYTHON", help="An interpreter with SAELens, whose own runner is measured beside."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure activations a second: harvested, trained on, and both as a run does them.

    The end-to-end figure is put beside the slower half and, with --peers, beside SAELens' end-to-end runner on the same
    model, contexts and shapes.
    """
    from spalf import launch
    from spalf.bench import harvest as measuring
    from spalf.bench import harvest_models, harvest_peers

    quiet = ctx.obj.quiet or as_json
    with tempfile.TemporaryDirectory() as folder:
        made = harvest_models.write(random_model, Path(folder), launch.device_of(device)) if random_model else ()
        if not quiet:
            note(f"measuring {recipe} ...")
        report = measuring.report(recipe, (*made, *sets), device=device, steps=steps, phase=phase)
        out = report.table() | ({"model": f"random {random_model}"} if random_model else {})
        if peers is not None:
            if not quiet:
                note("measuring SAELens ...")
            out["saelens"] = harvest_peers.measure(report, peers, steps)
    if as_json:
        write_json(out)
    else:
        show(table(out), summary(out))


def table(out: dict[str, Any]) -> Table:
    """One row per measurement."""
    from rich.table import Table

    head = f"{out['model']} at {out['hook']}, d {out['d_model']}, F {out['F']}, batch {out['batch']}; {out['device']}"
    drawn = Table(title=head, title_justify="left", box=None, pad_edge=False)
    drawn.add_column("")
    for name in ("activations/s", "tokens/s", "ms a batch", "host ms", "peak MiB"):
        drawn.add_column(name, justify="right")
    for row in out["rows"]:
        drawn.add_row(f"spalf, {TITLES[row['kind']]}", *_figures(row, out["batch"]))
    for row in out.get("saelens", {}).get("rows", ()):
        title = f"SAELens {out['saelens']['version']}, {row['variant']}"
        drawn.add_row(title, *((row["failed"],) if "failed" in row else _figures(row, out["batch"])))
    return drawn


def _figures(row: dict[str, Any], batch: int) -> tuple[str, ...]:
    per_batch = 1e3 * batch / row["rows"]
    return (
        f"{row['activations_per_s']:,.0f}",
        f"{row['tokens_per_s']:,.0f}",
        f"{per_batch * row['seconds']:.2f}",
        f"{per_batch * row['host_seconds']:.2f}" if "host_seconds" in row else "",
        f"{row['peak_bytes'] >> 20:,}" if row["peak_bytes"] else "",
    )


def summary(out: dict[str, Any]) -> str:
    """The ratios, in words."""
    lines = [f"end to end runs at {out['both_to_slower_half']:.0%} of the slower half"]
    peer = out.get("saelens", {})
    if "failed" in peer:
        lines.append(f"SAELens: {peer['failed']}")
    rates = [row["ours_to_theirs"] for row in peer.get("rows", ()) if "ours_to_theirs" in row]
    if rates:
        lines.append(f"and at {min(rates):.1f} x SAELens' fastest runner")
    return "; ".join(lines)
