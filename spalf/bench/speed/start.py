"""How long a user waits before anything happens: the help, and a recipe's first training step."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from attrs import frozen

RUNS = 5
QUICKSTART = "recipes/quickstart.toml"


@frozen(kw_only=True)
class Spent:
    """Seconds of a command: on the clock, and of the processor; what it complained about if it failed."""

    wall: float
    processor: float
    problem: str = ""


def _spent(*words: str) -> Spent:
    """A command of ours in a fresh process."""
    before, begin = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "spalf", *words], capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - begin, os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    last = next(iter(reversed(done.stderr.strip().splitlines())), f"exit code {done.returncode}")
    return Spent(wall=wall, processor=processor, problem=last if done.returncode else "")


def start(recipe: str) -> dict[str, Any]:
    """Seconds of `spalf --help`, the least of RUNS, and of `spalf run RECIPE --stop-at 1`, which also saves."""
    help_ = min((_spent("--help") for _ in range(RUNS)), key=lambda spent: spent.wall)
    out: dict[str, Any] = {"recipe": recipe, "help_s": help_.wall, "help_processor_s": help_.processor}
    with tempfile.TemporaryDirectory() as folder:
        first = _spent("--quiet", "run", recipe, "--stop-at", "1", "--out", str(Path(folder)))
    if first.problem:
        return {**out, "reason": first.problem}
    return {**out, "first_step_s": first.wall, "first_step_processor_s": first.processor}
