"""What is true of every command: global flags, errors without tracebacks, and commands of plugins."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

from spalf import hooks
from spalf.errors import ComponentError, RecipeError, SpalfError

FLAGS = ("--traceback", "--quiet")


def hoisted(args: Sequence[str]) -> list[str]:
    """The same arguments with the global flags in front, so that they may follow the command."""
    end = args.index("--") if "--" in args else len(args)
    flags = [flag for flag in FLAGS if flag in args[:end]]
    return [*flags, *(a for a in args[:end] if a not in FLAGS), *args[end:]]


def explain(error: Exception) -> tuple[str, int]:
    """What to tell a user about an error, and the exit code."""
    if isinstance(error, RecipeError) and len(error.problems) > 1:
        lines = "".join(f"\n  {problem}" for problem in error.problems)
        return f"{len(error.problems)} problems{lines}", error.exit_code
    if isinstance(error, SpalfError):
        return str(error), error.exit_code
    if _out_of_memory(error):
        first = next(iter(str(error).splitlines()), type(error).__name__)
        return (
            f"out of memory: {first} (lower budget.batch or knobs.F; spalf compile RECIPE estimates what is needed)",
            1,
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or type(error).__name__}", 2
    text = " ".join(str(error).split())
    return f"internal error: {type(error).__name__}: {text}; rerun with --traceback", 1


def _out_of_memory(error: Exception) -> bool:
    """torch's own class has this name on every device; its CPU allocator raises a plain RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


class Group(TyperGroup):
    """The group of all commands."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; an error becomes one message and an exit code unless `--traceback` is given."""
        words = hoisted(sys.argv[1:] if args is None else list(args))
        try:
            return super().main(
                args=words,
                prog_name=prog_name or "spalf",
                complete_var=complete_var,
                standalone_mode=standalone_mode,
                windows_expand_args=windows_expand_args,
                **extra,
            )
        except Exception as error:
            if "--traceback" in words:
                raise
            message, code = explain(error)
            typer.echo(f"{typer.style('spalf:', bold=True)} {message}", err=True)
            raise SystemExit(code) from error

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *self._of_plugins]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or self._of_plugins.get(cmd_name)

    @cached_property
    def _of_plugins(self) -> dict[str, Any]:
        """Commands that plugins add. Only plugins that can have one are imported: components need torch."""
        points = [point for point in entry_points(group="spalf") if mentions(point, "spalf_commands")]
        if not points:
            return {}
        manager = registered(points)
        extra = typer.Typer(add_completion=False)
        manager.hook.spalf_commands(app=extra)
        if not (extra.registered_commands or extra.registered_groups):
            return {}
        found: dict[str, Any] = dict(get_group(extra).commands)
        taken = sorted(found.keys() & self.commands.keys())
        if taken:
            raise ComponentError(f'a plugin adds a command "{taken[0]}", which spalf has already (rename it)')
        return found


def registered(points: Sequence[EntryPoint]) -> Any:
    """A plugin manager with these. Raises ComponentError for one that cannot be loaded, with its distribution."""
    manager = hooks.manager()
    try:
        for point in points:
            manager.register(point.load(), name=point.name)
    except Exception:
        from spalf.plugins import load

        load()  # meets the same plugin, and says whose it is
        raise
    return manager


def mentions(point: EntryPoint, word: str) -> bool:
    """Whether the source of a plugin names `word`; found without running the plugin. True where nobody can tell."""
    try:
        spec = importlib.util.find_spec(point.module)
    except (ImportError, ValueError):
        return True
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return True
    try:
        return word in Path(spec.origin).read_text(encoding="utf-8")
    except OSError:
        return True
