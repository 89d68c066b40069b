"""`python -m peer_steps TASK OUT`: measure the subject that the JSON file TASK names, and write its row to OUT."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from . import dictionary, saelens, sparsify
from .measure import Task, activations, attempt, settle

SUBJECTS = {**saelens.SUBJECTS, **dictionary.SUBJECTS, **sparsify.SUBJECTS}


def run(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The row of one subject."""
    task = Task(**options)
    settle(task)
    batches = activations(task)
    return attempt(lambda: SUBJECTS[name](task, batches), task, batches)


def main(asked: Path, answer: Path) -> None:
    """Read a task, write its row."""
    warnings.simplefilter("ignore")
    os.environ["WANDB_MODE"] = "disabled"
    given = json.loads(asked.read_text(encoding="utf-8"))
    answer.write_text(json.dumps(run(given["subject"], given["task"])), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
