"""The commands that change a feature inside the language model."""

from __future__ import annotations

from typing import Annotated

import typer

from spalf.cli.arguments import Device, Feature, Json, StateArg
from spalf.cli.terminal import note, show, write_json

Sequences = Annotated[
    int,
    typer.Option("--sequences", metavar="N", min=1, help="Held-out contexts that the feature is looked up in."),
]
Alone = Annotated[
    bool,
    typer.Option(
        "--without-error", help="Let the model read reconstructions: what they miss is then missing on both sides."
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(
        epilog='Example: spalf steer runs/quickstart --feature 82 --strength 2 --prompt "def main(args):"',
    )(steer)
    app.command(epilog="Example: spalf ablate runs/quickstart --feature 82 --json")(ablate)


def steer(
    ctx: typer.Context,
    checkpoint: StateArg,
    feature: Feature,
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", help="What the model continues.", show_default=False)
    ],
    strength: Annotated[
        float,
        typer.Option(
            "--strength",
            metavar="S",
            help="How much of the feature to add: 1 is its mean activation where it fires. Below 0 it is taken away.",
        ),
    ] = 2.0,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="How many to write.")] = 40,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", min=0.0, help="Of the sampling; 0 is greedy.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the sampling.")] = 0,
    without_error: Alone = False,
    sequences: Sequences = 256,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt with and without a feature's decoder direction added, side by side.

    The direction is added at every position but the first. What the dictionary does not explain is left as it is.
    """
    from spalf.launch import load

    if not (ctx.obj.quiet or as_json):
        note(f"loading {checkpoint} ...")
    run = load(checkpoint, device=device, sequences=sequences)
    told = run.steer(
        prompt,
        feature=feature,
        strength=strength,
        tokens=tokens,
        temperature=temperature,
        seed=seed,
        error=not without_error,
    )
    if as_json:
        write_json(told)
    else:
        from spalf.cli.effects import steered_parts

        show(*steered_parts(told))


def ablate(
    ctx: typer.Context,
    checkpoint: StateArg,
    feature: Feature,
    without_error: Alone = False,
    sequences: Sequences = 256,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What the language model loses on held-out text without a feature: where it fires, and where it does not.

    The feature is set to 0. What the dictionary does not explain is left as it is.
    """
    from spalf.launch import load

    if not (ctx.obj.quiet or as_json):
        note(f"measuring {checkpoint} ...")
    told = load(checkpoint, device=device, sequences=sequences).ablate(feature, error=not without_error)
    if as_json:
        write_json(told)
    else:
        from spalf.cli.effects import ablation_parts

        show(*ablation_parts(told))
