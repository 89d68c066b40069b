"""Other libraries' steps, each in a process of their own interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spalf.bench import peer_steps
from spalf.bench.peer_steps.measure import Task
from spalf.errors import Problem, RecipeError

NAMES = (
    *("SAELens JumpReLU", "SAELens TopK", "SAELens TopK sparse", "SAELens BatchTopK"),
    *("dictionary_learning JumpReLU", "dictionary_learning TopK", "dictionary_learning BatchTopK"),
    *("sparsify TopK + Adam", "sparsify TopK"),
)
"""As tables name them; the first word is the library."""

DEFAULT = Path(".venv/peers/bin/python")
SECONDS = 900
"""After which a peer's process is given up."""

_FOLDER = Path(peer_steps.__file__).parent
# Appended to the path, so that nothing beside the package can hide a module that a peer imports.
_START = (
    "import runpy, sys; sys.path.append({folder!r}); "
    "sys.argv[1:] = {arguments!r}; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
)


def interpreter(given: Path | None) -> Path | None:
    """The interpreter that has the peers, None where there is none. Raises RecipeError for one that does not exist."""
    if given is None:
        return DEFAULT.absolute() if DEFAULT.exists() else None
    if not given.exists():
        problem = Problem("--peers", f"{given} does not exist", "name a Python that has the libraries, or a wrapper")
        raise RecipeError([problem])
    return given.absolute()


def row(name: str, task: Task, python: Path | None) -> dict[str, Any]:
    """The measured row of a peer, or the reason why there is none."""
    head = {"name": name, "library": name.split()[0], "precision": task.precision}
    if python is None:
        return {**head, "status": "missing", "reason": f"no {DEFAULT} (make peers, or name an interpreter by --peers)"}
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "task.json", Path(folder) / "row.json"
        asked.write_text(json.dumps({"subject": name, "task": asdict(task)}), encoding="utf-8")
        return {**head, **_answer(command(python, asked, answer), answer, _environment(python))}


def command(python: Path, asked: Path, answer: Path) -> list[str]:
    """The call that measures what `asked` says and writes `answer`."""
    arguments = [str(asked), str(answer)]
    return [
        str(python),
        "-P",
        "-c",
        _START.format(folder=str(_FOLDER.parent), name=_FOLDER.name, arguments=arguments),
    ]


def _answer(call: list[str], answer: Path, environment: dict[str, str]) -> dict[str, Any]:
    try:
        done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"no answer within {SECONDS} s"}
    except OSError as e:
        return {"status": "failed", "reason": f"{call[0]}: {e.strerror}"}
    if done.returncode or not answer.exists():
        last = next(iter(reversed(done.stderr.strip().splitlines())), "no message")
        return {"status": "failed", "reason": f"its process ended with {done.returncode}: {last[:240]}"}
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def _environment(python: Path) -> dict[str, str]:
    """Ours; without our own path where the interpreter is a virtual environment, which has packages of its own."""
    out = dict(os.environ)
    if (python.parent.parent / "pyvenv.cfg").exists():
        out = {k: v for k, v in out.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return out
