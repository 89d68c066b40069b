"""What there is to choose from: components, presets, plugins."""

from __future__ import annotations

from typing import Annotated

import typer

from spalf.cli.terminal import show, write_json

Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")]

components = typer.Typer(help="What a recipe can be made of.", rich_markup_mode=None, no_args_is_help=True)
presets = typer.Typer(help="Recipes to extend.", rich_markup_mode=None, no_args_is_help=True)
plugins = typer.Typer(help="Installed packages that add to spalf.", rich_markup_mode=None, no_args_is_help=True)


@components.command("list", epilog="Example: spalf components list dual")
def list_components(
    slot: Annotated[str | None, typer.Argument(metavar="SLOT", help="One slot only.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the components of every slot with the first line of their contract."""
    from spalf.cli.describe import outline
    from spalf.core.slots import SLOTS
    from spalf.plugins import load

    _, offered = load()
    if slot is not None and slot not in SLOTS:
        offered.resolve(slot, "")
    rows = [outline(offered, ref) for ref in offered if slot in (None, ref.slot)]
    if as_json:
        write_json(rows)
    else:
        from spalf.cli.render import component_table

        show(component_table(rows))


@components.command("show", epilog="Example: spalf components show dual adrc")
def show_component(
    slot: Annotated[str, typer.Argument(metavar="SLOT", help="Such as dual.", show_default=False)],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Such as adrc.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show a component's options with types, defaults and bounds, its contract, and the package it came from."""
    from spalf.cli.describe import describe
    from spalf.core.slots import ComponentRef
    from spalf.plugins import load

    _, offered = load()
    offered.resolve(slot, name)
    described = describe(offered, ComponentRef(slot, name))
    if as_json:
        write_json(described)
    else:
        from spalf.cli.render import component_parts

        show(*component_parts(described))


@presets.command("list", epilog="Example: spalf presets list --json")
def list_presets(as_json: Json = False) -> None:
    """List the presets with the first line of each."""
    from spalf.assembly import toml

    rows = [{"name": name, "doc": _first_comment(toml.preset(name))} for name in toml.presets()]
    if as_json:
        write_json(rows)
    else:
        from spalf.cli.render import plain_table

        show(plain_table(["preset", "what it is"], [[row["name"], row["doc"]] for row in rows]))


@presets.command("show", epilog="Example: spalf presets show spalf")
def show_preset(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Such as spalf.", show_default=False)],
) -> None:
    """Print a preset, a TOML file as it stands."""
    from spalf.assembly import toml
    from spalf.assembly.hints import suggest
    from spalf.errors import Problem, RecipeError

    if name not in toml.presets():
        raise RecipeError([Problem("preset", f'no preset is called "{name}"', suggest(name, toml.presets(), "known"))])
    typer.echo(toml.preset(name), nl=False)


@plugins.command("list", epilog="Example: spalf plugins list --json")
def list_plugins(as_json: Json = False) -> None:
    """List the packages that offer components, commands or observers."""
    from spalf.cli.describe import plugin_rows
    from spalf.plugins import load, origin_of

    manager, offered = load()
    rows = plugin_rows(manager, offered, origin_of)
    if as_json:
        write_json(rows)
    else:
        from spalf.cli.render import plain_table

        show(
            plain_table(
                ["plugin", "from", "components", "hooks"],
                [
                    [r["name"], r["origin"], ", ".join(r["components"]) or "-", ", ".join(r["hooks"]) or "-"]
                    for r in rows
                ],
            )
        )


def _first_comment(text: str) -> str:
    first = text.partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
