"""The public surface, frozen: names, signatures and every command's help as a snapshot.

A change here is a change that users notice. If it is meant, write the snapshot again with
`python tests/test_surface.py` and add a line to CHANGELOG.md.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import spalf
from spalf.cli import app, group

SNAPSHOT = Path(__file__).with_name("surface.txt")


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and group by its words."""
    yield path
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from commands(inner, (*path, name))


def surface() -> str:
    """Public names with what they are, then every help text, as one file."""
    parts = ["# spalf"]
    for name in spalf.__all__:
        value = getattr(spalf, name)
        if inspect.isfunction(value):
            parts.append(f"{name}{inspect.signature(value)}")
        else:
            parts.append(name)
    for path in commands(get_command(app)):
        shown = CliRunner().invoke(app, [*path, "--help"], prog_name="spalf")
        assert shown.exit_code == 0, shown.output
        parts.append(f"\n# {' '.join(('spalf', *path))} --help\n{shown.stdout.rstrip()}")
    return "\n".join(parts) + "\n"


@pytest.fixture(autouse=True)
def only_spalf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of whatever else is installed are not spalf's surface."""
    monkeypatch.setattr(group, "entry_points", lambda group: [])


def test_the_surface_is_the_snapshot() -> None:
    assert surface() == SNAPSHOT.read_text(encoding="utf-8")


def test_every_command_has_an_example() -> None:
    for path in commands(get_command(app)):
        command: Any = get_command(app)
        for word in path:
            command = command.commands[word]
        if not hasattr(command, "commands") and any(p.param_type_name == "argument" for p in command.params):
            assert (command.epilog or "").startswith(f"Example: spalf {' '.join(path)} "), path


def type_checked() -> dict[str, str]:
    """Name -> module of the imports that only a type checker sees."""
    tree = ast.parse(Path(spalf.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        alias.name: node.module or "" for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_type_checkers_and_python_see_the_same_names() -> None:
    assert {*type_checked(), "__version__"} == set(spalf.__all__)
    for name, module in type_checked().items():
        assert getattr(spalf, name) is getattr(sys.modules[module], name), name


def test_names_are_sorted_and_listed() -> None:
    assert spalf.__all__ == sorted(spalf.__all__)
    assert set(spalf.__all__) <= set(dir(spalf))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'spalf' has no attribute 'duel'"):
        spalf.duel  # noqa: B018


def test_importing_spalf_waits_for_nothing() -> None:
    program = "import sys, spalf; sys.exit(' '.join({'torch', 'attrs', 'pluggy', 'typer'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


if __name__ == "__main__":
    group.entry_points = lambda group: []  # type: ignore[assignment]
    SNAPSHOT.write_text(surface(), encoding="utf-8")
