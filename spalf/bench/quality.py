"""`spalf bench quality`: a suite of trainings, ours and other libraries', worked on visit by visit."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from spalf import launch
from spalf.bench import results
from spalf.bench.queue import Outcome, Queue, Visit
from spalf.bench.render import render
from spalf.bench.suite import Suite, read
from spalf.bench.summary import current
from spalf.errors import Problem, RecipeError

PYTHON = Path(".venv/peers/bin/python")
"""Where `make peers` puts the peers' interpreter."""


def quality(
    suite: str | Path,
    *,
    sets: Sequence[str] = (),
    only: str = "*",
    jobs: int = 1,
    minutes: float | None = None,
    peers: str = "",
    out: str | Path | None = None,
    page: str | Path | None = None,
    device: str = "auto",
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[Outcome, Path]:
    """Work on a suite's queue, then render `page`; what came of it, and the directory of its results.

    `only` is a pattern of job names, or several by commas, first ones first; `jobs` how many work at once on each
    device; `peers` the command of the peers' interpreter. With 0 `minutes` nothing is started. Raises RecipeError
    before anything is started, with all problems of the suite.
    """
    read_suite = read(suite)
    launch.device_of(device)
    directory = Path(out) if out is not None else Path("bench") / read_suite.name
    visit = Visit(
        out=directory.resolve(),
        only=only,
        jobs=jobs,
        minutes=float("inf") if minutes is None else minutes,
        peers=interpreter(read_suite, peers),
        device=device,
    )
    if minutes == 0:  # a page is made of lines alone: neither model nor data need be there
        held = current(read_suite, results.read(directory))
        outcome = Outcome(done=tuple(line["job"]["name"] for line in held), failed={}, left={})
    else:
        outcome = Queue(read_suite, sets, visit, tell).run()
    if page is not None:
        render(read_suite, results.read(directory), Path(page))
    return outcome, directory


def interpreter(suite: Suite, command: str) -> tuple[str, ...]:
    """The words of a command that runs Python with the peers; () where none is needed or none is there.

    Raises RecipeError where one is named that cannot be run.
    """
    if not any(method.peer for method in suite.methods):
        return ()
    if not command:
        return (str(PYTHON.absolute()),) if PYTHON.exists() else ()
    words = shlex.split(command)
    found = shutil.which(words[0]) if words else None
    if found is None:
        hint = "name an executable with its arguments, such as .venv/peers/bin/python"
        raise RecipeError([Problem("--peers", f"{command!r} cannot be run", hint)])
    return (str(Path(found).absolute()), *words[1:])
