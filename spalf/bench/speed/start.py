"""How long a user waits before anything happens: the help, and a recipe's first training step."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RUNS = 5
QUICKSTART = "recipes/quickstart.toml"


def _seconds(*words: str) -> tuple[float, str]:
    """Wall time of a command of ours in a fresh process, and what it complained about if it failed."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "spalf", *words], capture_output=True, text=True, check=False)
    spent = time.perf_counter() - begin
    last = next(iter(reversed(done.stderr.strip().splitlines())), f"exit code {done.returncode}")
    return spent, last if done.returncode else ""


def start(recipe: str) -> dict[str, Any]:
    """Seconds of `spalf --help`, the median of RUNS, and of `spalf run RECIPE --stop-at 1`, which also saves."""
    helps = sorted(_seconds("--help")[0] for _ in range(RUNS))
    out: dict[str, Any] = {"help_s": helps[len(helps) // 2], "help_all_s": helps}
    with tempfile.TemporaryDirectory() as folder:
        spent, problem = _seconds("--quiet", "run", recipe, "--stop-at", "1", "--out", str(Path(folder)))
    return {**out, "recipe": recipe, **({"reason": problem} if problem else {"first_step_s": spent})}
