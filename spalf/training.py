"""A run from its first step to its summary: watched, measured at its end, and ended well."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from spalf.engine.examples import FeatureExample, examples
from spalf.engine.run import Interrupt, Run, stopping
from spalf.engine.summary import summarize
from spalf.errors import DivergedError, RunError, SpalfError
from spalf.record import Recorder, write_json


@frozen(kw_only=True)
class Result:
    """The end of a run: its directory, outcome ("done" or "stopped"), summary.json's content, and feature examples."""

    directory: Path
    outcome: str
    summary: dict[str, Any]
    examples: list[FeatureExample]


def train(started: Run, manager: Any, observers: Sequence[object], stop_at: int | None = None) -> Result:
    """Take a started or resumed run to its end, with its record and `observers` registered at `manager`.

    summary.json is written and `spalf_ended` called whatever the end, except a kill. Raises what a run raises.
    """
    started.directory.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(started.directory, started.plan, started.recipe_text)
    for observer in (recorder, *observers):
        manager.register(observer)
    try:
        with stopping(started):
            return _finish(started, recorder, _outcome(started, stop_at))
    except Interrupt:
        return _stopped(started, recorder)
    except Exception as e:
        outcome = "diverged" if isinstance(e, DivergedError) else "failed"
        said = str(e) if isinstance(e, SpalfError) else f"{type(e).__name__}: {e}"
        _conclude(started, recorder, {**_ending(started, outcome), "notes": [said]})
        raise
    finally:
        for observer in (recorder, *observers):
            manager.unregister(observer)


def _outcome(started: Run, stop_at: int | None) -> str:
    """Train. Raises RunError where the device's memory is full, else what a run raises."""
    try:
        return started.train(stop_at)
    except torch.OutOfMemoryError as e:
        first = re.split(r"(?<=\.)\s", str(e), maxsplit=1)[0]
        raise RunError(f"out of device memory: {first} (lower budget.batch, knobs.F or source.sequences)") from e


def _ending(ended: Run, outcome: str) -> dict[str, Any]:
    clock = ended.state.clock
    return {"name": ended.plan.recipe.name, "outcome": outcome, "step": clock.step, "phase": clock.phase}


def _conclude(ended: Run, recorder: Recorder, summary: dict[str, Any]) -> None:
    """Write the summary, then tell the observers."""
    recorder.write_summary(summary)
    ended.hooks.spalf_ended(run=ended, summary=summary)


def _stopped(ended: Run, recorder: Recorder) -> Result:
    """A stopped run says only where; it is measured when it has been resumed to its end."""
    summary = _ending(ended, "stopped")
    _conclude(ended, recorder, summary)
    return Result(directory=ended.directory, outcome="stopped", summary=summary, examples=[])


def _finish(ended: Run, recorder: Recorder, outcome: str) -> Result:
    """Measure a finished run, unless it was asked to stop."""
    if outcome != "done" or ended.asked_to_stop:
        return _stopped(ended, recorder)
    plan, state = ended.plan, ended.state
    with ended.timed("evaluate"):
        summary = summarize(plan, state, outcome, ended.wall)
        shown = examples(plan, state)
    summary["wall_seconds"] = {k: round(v, 3) for k, v in ended.wall.items()}
    write_json(ended.directory / "features.json", shown)
    _conclude(ended, recorder, summary)
    return Result(directory=ended.directory, outcome=outcome, summary=summary, examples=shown)
