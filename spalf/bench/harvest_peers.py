"""SAELens' end-to-end runner beside ours: the same model, contexts, shapes and device, in its own interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spalf.bench.harvest import WARMUP, Report
from spalf.bench.harvest_worker import VARIANTS
from spalf.errors import Problem, RecipeError
from spalf.parts.source import checkpoint

WORKER = Path(__file__).with_name("harvest_worker.py")
SECONDS = 900
"""After which the other interpreter is given up."""
CONTEXTS = 1 << 14
"""Contexts handed over at most; a longer run reads them again."""


def order(report: Report, steps: int, folder: Path, variants: Sequence[str]) -> dict[str, Any]:
    """What the worker is asked for, with the contexts of our own stream written beside it."""
    import numpy as np

    plan, state = report.plan, report.state
    source: Any = plan.recipe.source
    batch, context = plan.recipe.budget.batch, plan.facts.context
    if not hasattr(source, "layer"):
        raise RecipeError([Problem("--peers", "the hook is not a decoder block", "take a huggingface source")])
    wanted = (WARMUP + steps) * batch // context + 4 * source.sequences
    tokens_ST = state.stream.sequences(min(wanted, CONTEXTS)).tokens_ST
    np.save(folder / "contexts.npy", tokens_ST.cpu().numpy())
    return {
        "model": checkpoint.locate(source.model)[0],
        "tokens": str(folder / "contexts.npy"),
        "layer": source.layer,
        "d_model": plan.facts.d_model,
        "width": plan.knobs.F,
        "batch": batch,
        "context": context,
        "sequences": source.sequences,
        "warmup": WARMUP,
        "steps": steps,
        "device": str(state.device),
        "dtype": source.dtype,
        "autocast": state.device.type == "cuda",
        "seed": plan.recipe.seed,
        "variants": list(variants),
    }


def measure(report: Report, python: Path, steps: int, variants: Sequence[str] = VARIANTS) -> dict[str, Any]:
    """Rows of SAELens' runner, each with its rate, or with the reason why there is none.

    Raises RecipeError where there is no such interpreter.
    """
    if not python.exists():
        raise RecipeError([Problem("--peers", f"{python} does not exist", "name a Python that has SAELens")])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked, answer = folder / "order.json", folder / "answer.json"
        asked.write_text(json.dumps(order(report, steps, folder, variants)), encoding="utf-8")
        said = _run([str(python.absolute()), "-P", str(WORKER), str(asked), str(answer)], python)
        if not answer.exists():
            return {"version": "", "rows": [], "failed": said}
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    for row in found["rows"]:
        if "failed" not in row:
            # Theirs are rows of every position, each of them a token.
            row["activations_per_s"] = row["tokens_per_s"] = row["rows"] / row["seconds"]
            row["ours_to_theirs"] = report.rate("both") / row["activations_per_s"]
    return found


def _run(command: Sequence[str], python: Path) -> str:
    """Run it to its end, or for a quarter of an hour; its last line of stderr."""
    env = dict(os.environ)
    if (python.parent.parent / "pyvenv.cfg").exists():  # an environment of its own, with packages of its own
        env = {k: v for k, v in env.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer within {SECONDS} s"
    except OSError as e:
        return f"{command[0]}: {e.strerror}"
    return next(iter(reversed(done.stderr.strip().splitlines())), f"ended with {done.returncode}")[:300]
