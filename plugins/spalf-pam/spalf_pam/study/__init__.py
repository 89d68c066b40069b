"""PAM against joint gradient descent, on little data and on more: `spalf pam study`."""

from __future__ import annotations

from pathlib import Path

from spalf import Problem, RecipeError
from spalf_pam.study.data import Rows, digits, language, mnist


def load(name: str, rows: int, directory: Path | None = None) -> Rows:
    """The data of that name, `rows` of them for training. Raises RecipeError for a name that there is not."""
    if name == "digits":
        return digits(rows)
    if name == "language":
        return language(rows)
    if name != "mnist":
        raise RecipeError([Problem("--data", f'there is no "{name}" to study', "use digits, language or mnist")])
    if directory is None:
        raise RecipeError([Problem("--mnist", "is missing", "name a directory with MNIST's IDX files")])
    return mnist(directory, rows)
