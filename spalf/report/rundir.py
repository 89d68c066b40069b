"""What a run has written beside its checkpoints, read back with care: it may still be running, or be damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from spalf.errors import CheckpointError

Line = Mapping[str, Any]


@frozen(kw_only=True)
class RunRecord:
    """The lines of metrics.jsonl, summary.json, and the filled recipe's text.

    `summary` is empty while a run has not ended.
    """

    directory: Path
    metrics: tuple[Line, ...]
    summary: Mapping[str, Any]
    recipe: str


def read(directory: Path) -> RunRecord:
    """The record of a run directory. A last line that is still being written is left out.

    Raises CheckpointError that names the file, and the line where there is one, that cannot be read.
    """
    return RunRecord(
        directory=directory,
        metrics=tuple(_lines(directory / "metrics.jsonl")),
        summary=_summary(directory / "summary.json"),
        recipe=_text(directory / "recipe.toml") or "",
    )


def _text(file: Path) -> str | None:
    """A file's text; None where there is no such file."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{file}: cannot be read: {e}") from e


def _lines(file: Path) -> list[Line]:
    found: list[Line] = []
    text = _text(file) or ""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            value = json.loads(line)
        except ValueError as e:
            if not line.endswith("\n"):
                break
            raise CheckpointError(f"{file}, line {number}: is no JSON: {e} (delete the line)") from e
        if not (isinstance(value, dict) and isinstance(value.get("step"), int) and isinstance(value.get("phase"), str)):
            raise CheckpointError(f"{file}, line {number}: has no step and phase (delete the line)")
        found.append(value)
    return found


def _summary(file: Path) -> Mapping[str, Any]:
    text = _text(file)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as e:
        raise CheckpointError(f"{file}: is no JSON: {e} (delete it: spalf resume writes it again)") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a {type(value).__name__}, not a table (delete it)")
    return value
