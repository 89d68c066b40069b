"""What is true of every command: no traceback, the right exit code, global flags anywhere, plugins' commands."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from spalf import hooks
from spalf.cli import app, group
from spalf.errors import CheckpointError, ComponentError, RunError, SpalfError

Spalf = Callable[..., Result]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CheckpointError("runs/x: has no checkpoint (run it first)"), 2, "spalf: runs/x: has no checkpoint"),
        (RunError("the phase fit ended early (raise budget)"), 1, "spalf: the phase fit ended early (raise budget)"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 2, "spalf: a/b: No such file or directory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 3 GiB"), 1, "spalf: out of memory: CUDA out of memory."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "lower budget.batch or knobs.F"),
        (MemoryError(), 1, "spalf: out of memory: MemoryError"),
        (ValueError("a [b]\n c"), 1, "spalf: internal error: ValueError: a [b] c; rerun with --traceback"),
    ],
)
def test_an_error_is_one_message_and_an_exit_code(
    spalf: Spalf, launch: Any, error: Exception, code: int, words: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    launch.harvest = fail
    told = spalf("harvest", "runs/x", "out")
    assert told.exit_code == code
    assert words in told.stderr
    assert len(told.stderr.splitlines()) == 1
    assert told.stdout == ""


@pytest.mark.parametrize("words", [["--traceback", "harvest", "a", "b"], ["harvest", "a", "b", "--traceback"]])
def test_traceback_lets_an_error_through(spalf: Spalf, launch: Any, words: list[str]) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise SpalfError("no")

    launch.harvest = fail
    assert isinstance(spalf(*words).exception, SpalfError)


def test_every_kind_of_ours_has_an_exit_code_of_the_contract() -> None:
    kinds = [SpalfError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert {kind.__name__ for kind in kinds if kind.exit_code not in (1, 2)} == set()


@given(st.lists(st.sampled_from(["--quiet", "--traceback", "run", "--set", "a=1", "--", "x"])))
def test_hoisting_moves_flags_and_changes_nothing_else(args: list[str]) -> None:
    out = group.hoisted(args)
    end = args.index("--") if "--" in args else len(args)
    assert set(out) == set(args)
    rest = [a for a in args[:end] if a not in group.FLAGS] + args[end:]
    assert out[len(out) - len(rest) :] == rest
    assert group.hoisted(out) == out


def test_version_names_python_and_torch(spalf: Spalf) -> None:
    assert spalf("--version").stdout.startswith("spalf 0.1.0 (python 3.")


def test_help_is_there_without_torch_and_in_time() -> None:
    program = (
        "import sys; from spalf.cli import main\ntry: main()\nfinally: assert not {'torch', 'rich'} & {*sys.modules}"
    )
    took = []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True)
        took.append(time.perf_counter() - begin)
    assert "Usage: spalf" in done.stdout
    assert min(took) < 1.0


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "spalf", "nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No such command 'nonsense'" in done.stderr


class Greeter:
    """A plugin with a command of its own."""

    def __init__(self, name: str = "greet") -> None:
        self.name = name

    @hooks.hookimpl
    def spalf_commands(self, app: Any) -> None:
        @app.command(self.name)
        def greet(whom: str) -> None:
            """Say hello [politely]."""
            if whom == "nobody":
                raise ComponentError("nobody is there (name somebody)")
            sys.stdout.write(f"hello {whom}\n")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[object, str], None]:
    """Pretend that a distribution offers a plugin from a module with this source."""

    def do(plugin: object, source: str) -> None:
        (tmp_path / "some_plugin.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        point = EntryPoint(name="some", value="some_plugin", group="spalf")
        monkeypatch.setattr(group, "entry_points", lambda group: [point])
        if "spalf_commands" in source:
            monkeypatch.setitem(sys.modules, "some_plugin", plugin)  # type: ignore[arg-type]

    return do


HOOK = "def spalf_commands(app): ...\n"


def test_a_plugin_s_command_is_listed_and_runs(install: Callable[[object, str], None], spalf: Spalf) -> None:
    install(Greeter(), HOOK)
    assert "Say hello [politely]." in spalf("--help").stdout
    assert spalf("greet", "world").stdout == "hello world\n"


def test_a_plugin_s_error_is_told_as_ours_are(install: Callable[[object, str], None], spalf: Spalf) -> None:
    install(Greeter(), HOOK)
    told = spalf("greet", "nobody")
    assert (told.exit_code, told.stderr) == (2, "spalf: nobody is there (name somebody)\n")


def test_a_plugin_cannot_take_a_command_of_ours(install: Callable[[object, str], None], spalf: Spalf) -> None:
    install(Greeter("run"), HOOK)
    told = spalf("--help")
    assert told.exit_code == 2
    assert 'a plugin adds a command "run", which spalf has already (rename it)' in told.stderr


def test_plugins_without_commands_are_not_loaded(
    install: Callable[[object, str], None], spalf: Spalf, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Greeter(), "raise SystemExit('loaded')\n")
    assert spalf("--help").exit_code == 0
    assert "some_plugin" not in sys.modules


def test_a_plugin_that_fails_is_named(
    install: Callable[[object, str], None], spalf: Spalf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manager of components meets the same plugin, and knows its distribution."""

    def load() -> None:
        raise ComponentError("acme 1.2: cannot be imported")

    module: Any = ModuleType("spalf.plugins")
    module.load = load
    monkeypatch.setitem(sys.modules, "spalf.plugins", module)
    install(Greeter(), HOOK)
    monkeypatch.delitem(sys.modules, "some_plugin")
    monkeypatch.setattr(group, "mentions", lambda point, word: True)
    monkeypatch.setattr(EntryPoint, "load", lambda self: 1 / 0)
    told = spalf("--help")
    assert (told.exit_code, told.stderr) == (2, "spalf: acme 1.2: cannot be imported\n")


def test_a_plugin_whose_source_cannot_be_read_is_loaded() -> None:
    assert group.mentions(EntryPoint(name="x", value="no_such_module_at_all", group="spalf"), "spalf_commands")


def test_the_app_can_be_called_twice(spalf: Spalf) -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == spalf("--version").stdout
