"""What a run leaves beside its checkpoints: recipe.toml, plan.json, metrics.jsonl, summary.json."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from spalf.core.recipe import Plan
from spalf.core.slots import ComponentRef
from spalf.core.values import Reading
from spalf.hooks import hookimpl


def plain(x: Any) -> Any:
    """`x` as JSON can hold it: records become objects, components name their `use`, NaN and infinities become null."""
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if x is None or isinstance(x, bool | int | str):
        return x
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, set | frozenset):
        return sorted(plain(v) for v in x)
    if isinstance(x, tuple | list):
        return [plain(v) for v in x]
    if isinstance(x, os.PathLike):
        return os.fspath(x)
    if attrs.has(type(x)):
        ref = getattr(type(x), "__spalf__", None)
        use = {"use": ref.use} if isinstance(ref, ComponentRef) else {}
        return use | {a.name: plain(getattr(x, a.name)) for a in attrs.fields(type(x))}
    raise TypeError(f"a {type(x).__name__} has no place in JSON")


def write_whole(path: Path, text: str) -> None:
    """Write `text` so that `path` is never half-written: a temporary name beside it, flushed, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `plain(value)` as indented JSON, whole."""
    write_whole(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


class Recorder:
    """An observer that keeps a run's record in `directory`.

    recipe.toml and plan.json are written at once. metrics.jsonl gets a line at every step that `record.log_every`
    counts; a resumed run first drops the lines that it is about to write again.
    """

    def __init__(self, directory: Path, plan: Plan, recipe_text: str) -> None:
        self.directory = directory
        self.plan = plan
        self._order = {name: i for i, name in enumerate(plan.recipe.phases)}
        self._lines: int | None = None
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / "recipe.toml", recipe_text)
        write_json(directory / "plan.json", plan)

    @property
    def metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, whole; a number that is not finite becomes null."""
        write_json(self.directory / "summary.json", summary)

    @hookimpl(tryfirst=True)
    def spalf_stepped(self, run: Any, reading: Reading) -> None:
        # Calibration takes steps that the clock does not count; the run counts all, over a resume too.
        if run.readings % self.plan.recipe.record.log_every:
            return
        line = plain(reading.scalars())
        if self._lines is None:
            self._lines = self._drop_from(self._place(line))
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        run.hooks.spalf_logged(run=run, line=line, index=self._lines)
        self._lines += 1

    def _place(self, line: Mapping[str, Any]) -> tuple[float, float, float]:
        """When a line was written, in an order that holds through a whole run."""
        return self._order.get(line["phase"], -1), line["step"], line.get("tokens") or 0.0

    def _drop_from(self, place: tuple[float, float, float]) -> int:
        """Keep only whole lines from before `place`; returns how many."""
        if not self.metrics.exists():
            return 0
        kept = []
        for text in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                break
            if self._place(line) < place:
                kept.append(text + "\n")
        write_whole(self.metrics, "".join(kept))
        return len(kept)
