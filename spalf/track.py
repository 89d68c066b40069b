"""Trackers: copies of metrics.jsonl for other programs to show. They observe, and none of them can stop a run."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pluggy

from spalf import hooks
from spalf.core.recipe import Plan
from spalf.core.values import Reading
from spalf.errors import ComponentError
from spalf.hooks import hookimpl
from spalf.record import write_whole

logger = logging.getLogger("spalf")


def flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line's numbers and words by dotted name: {"constraints": {"drift": {"g": 1}}} is constraints.drift.g = 1."""
    return dict(_flat("", line))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, value


class Tracking:
    """A tracker as a run's observer: what it raises is said once, in the log, and ends its tracking alone."""

    def __init__(self, name: str, tracker: object) -> None:
        self.name = name
        self._manager: pluggy.PluginManager | None = hooks.manager()
        self._manager.register(tracker)

    def _pass(self, hook: str, **given: Any) -> None:
        if self._manager is None:
            return
        try:
            getattr(self._manager.hook, hook)(**given)
        except Exception as e:
            self._manager = None
            logger.warning("tracker %s has stopped, the run goes on: %s: %s", self.name, type(e).__name__, e)

    @hookimpl
    def spalf_phase_entered(self, run: Any, name: str) -> None:
        self._pass("spalf_phase_entered", run=run, name=name)

    @hookimpl
    def spalf_stepped(self, run: Any, reading: Reading) -> None:
        self._pass("spalf_stepped", run=run, reading=reading)

    @hookimpl
    def spalf_logged(self, run: Any, line: Mapping[str, Any], index: int) -> None:
        self._pass("spalf_logged", run=run, line=line, index=index)

    @hookimpl
    def spalf_saved(self, run: Any, path: Path) -> None:
        self._pass("spalf_saved", run=run, path=path)

    @hookimpl
    def spalf_ended(self, run: Any, summary: Mapping[str, Any]) -> None:
        self._pass("spalf_ended", run=run, summary=summary)


class Csv:
    """`csv`: metrics.jsonl as metrics.csv, a column per dotted name, empty where a phase does not have it.

    Made anew from metrics.jsonl when a run begins or goes on, and where a phase brings columns that were not there.
    """

    def __init__(self, plan: Plan, directory: Path) -> None:
        self._lines, self._path = directory / "metrics.jsonl", directory / "metrics.csv"
        self._columns: list[str] = []

    @hookimpl
    def spalf_logged(self, line: Mapping[str, Any]) -> None:
        row = flat(line)
        if not self._columns or not row.keys() <= set(self._columns):
            self._anew()
            return
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _anew(self) -> None:
        rows = [flat(json.loads(text)) for text in self._lines.read_text(encoding="utf-8").splitlines()]
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self._path, out.getvalue())


class TensorBoard:
    """`tensorboard`: event files under trackers/tensorboard, a TensorBoard run for each phase.

    The axis is the training step, and in a phase that takes none, such as calibration, the phase's own count. What a
    resumed run is about to write again is purged, as TensorBoard does it: hidden when the files are read.
    """

    def __init__(self, plan: Plan, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ComponentError(
                'record.track: "tensorboard" needs a package that is not installed (pip install "spalf[tensorboard]")'
            ) from e
        self._writer_of: Callable[..., Any] = SummaryWriter
        self._phases = plan.recipe.phases
        self._root = directory / "trackers" / "tensorboard"
        self._entered: set[str] = set()
        self._phase = ""
        self._writer: Any = None

    @hookimpl
    def spalf_phase_entered(self, name: str) -> None:
        self._entered.add(name)

    @hookimpl
    def spalf_logged(self, run: Any, line: Mapping[str, Any]) -> None:
        clock = run.state.clock
        step = run.readings if clock.step == clock.entered else int(line["step"])
        if self._phase != line["phase"]:
            self._open(line["phase"], step)
        for name, value in flat(line).items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name.replace(".", "/"), value, step)

    @hookimpl
    def spalf_saved(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    @hookimpl
    def spalf_ended(self) -> None:
        self._close()

    def _open(self, phase: str, step: int) -> None:
        """Go on in a phase's files from `step` on, or from the start where the phase was entered just now."""
        self._close()
        if not self._phase:  # of later phases, an earlier attempt may have left what no longer holds
            for later in self._phases[self._phases.index(phase) + 1 :]:
                if (self._root / later).exists():
                    self._writer_of(str(self._root / later), purge_step=0).close()
        start = 0 if phase in self._entered else step
        known = (self._root / phase).exists()
        self._writer = self._writer_of(str(self._root / phase), purge_step=start if known else None)
        self._phase = phase

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@hookimpl
def spalf_trackers() -> dict[str, Callable[[Plan, Path], object]]:
    return {"csv": Csv, "tensorboard": TensorBoard}
