"""A run: its phases in order, its checkpoints, its observers. No mathematics."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import define, evolve, field
from torch import Tensor

from spalf.core.protocols import Stream
from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.tree import to
from spalf.core.values import Batch, Reading
from spalf.engine import checkpoint
from spalf.engine.build import build
from spalf.errors import CheckpointError, DivergedError, Problem, RecipeError
from spalf.kernels.reference import tensor_cores

ASK_EVERY = 10  # steps between asking a gate, which waits for the device


class Interrupt(BaseException):
    """A signal that came when no step was left to stop after. Not an Exception, which an evaluator may catch."""


class TimedStream:
    """A stream that adds the seconds spent in `next` to `wall["harvest"]`."""

    def __init__(self, stream: Stream, wall: dict[str, float]) -> None:
        self._stream, self._wall = stream, wall

    def next(self, n: int) -> Batch:
        begin = time.perf_counter()
        try:
            return self._stream.next(n)
        finally:
            self._wall["harvest"] = self._wall.get("harvest", 0.0) + time.perf_counter() - begin

    def state_dict(self) -> dict[str, Any]:
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._stream.load_state_dict(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@define(kw_only=True, eq=False)
class Run:
    """A plan, its state and its directory. `hooks` is pluggy's caller of the observers."""

    plan: Plan
    state: TrainingState
    directory: Path
    hooks: Any
    recipe_text: str
    wall: dict[str, float] = field(factory=dict)
    outcome: str = "running"
    readings: int = 0
    """Steps of the current phase so far, over a resume too: calibration takes steps that no clock counts."""
    _serial: int = 0
    _since_save: int = 0
    _stop: bool = False
    _enter: bool = True

    @classmethod
    def start(cls, plan: Plan, directory: Path, *, device: torch.device, hooks: Any, recipe_text: str) -> Run:
        """A run at step 0 whose first phase is still to be entered."""
        wall: dict[str, float] = {}
        with _timed(wall, "build"):
            state = build(plan, device)
        state.stream = TimedStream(state.stream, wall)
        return cls(plan=plan, state=state, directory=directory, hooks=hooks, recipe_text=recipe_text, wall=wall)

    @classmethod
    def resume(cls, plan: Plan, path: Path, *, device: torch.device, hooks: Any, recipe_text: str) -> Run:
        """The run that wrote the checkpoint at `path`, at the step where it was written.

        Raises CheckpointError where `path` does not lie in a run directory, which could not be told where to write,
        and RecipeError where the plan's budget is below what is done; both before anything is built.
        """
        path = path if len(path.parts) > 2 else path.absolute()
        if path.parent.name != "checkpoints":
            raise CheckpointError(f"{path}: lies in no run directory (move it to <run>/checkpoints/{path.name})")
        done = int(checkpoint.metadata(path)["step"])
        if plan.total_steps < done:
            message = f"asks for {plan.total_steps} steps in all, but {done} are done"
            raise RecipeError([Problem("budget", message, "raise budget.tokens")])
        run = cls.start(plan, path.parent.parent, device=device, hooks=hooks, recipe_text=recipe_text)
        meta = checkpoint.load(path, plan, run.state)
        # An overridden budget moves the end of the run, and nothing else.
        run.state.clock = evolve(run.state.clock, total=plan.total_steps)
        run.wall.update({k: float(v) for k, v in meta.get("wall", {}).items() if k != "build"})
        run.readings = int(meta.get("readings", 0))
        # Of all checkpoints, not of this one: what is written from here on is newer than what an older end left.
        run._serial = max(map(checkpoint.serial, checkpoint.all_in(path.parent)), default=0)
        run._enter = False
        return run

    @property
    def asked_to_stop(self) -> bool:
        return self._stop

    def stop(self) -> None:
        """Ask for a checkpoint and an end after the step that is being taken. Safe to call from a signal handler."""
        self._stop = True

    def train(self, stop_at: int | None = None) -> str:
        """Run the phases to their end, or to step `stop_at`; returns "done" or "stopped".

        Raises DivergedError when a number stops being finite, RunError on anything a phase cannot go on from.
        """
        try:
            self.outcome = self._train(stop_at)
        except DivergedError:
            self.outcome = "diverged"
            raise
        return self.outcome

    def save(self) -> Path:
        """Write a checkpoint and tell the observers. Raises DivergedError where a number is not finite."""
        with _timed(self.wall, "save"):
            self._serial += 1
            where = self.directory / "checkpoints"
            wall = {k: round(v, 3) for k, v in self.wall.items()}
            extra = {"serial": self._serial, "readings": self.readings, "wall": wall}
            path = checkpoint.save(self.plan, self.state, where, self.recipe_text, extra)
            checkpoint.prune(where, self.plan.recipe.record.keep)
        self._since_save = 0
        self.hooks.spalf_saved(run=self, path=path)
        return path

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Count a block's seconds under `name`."""
        return _timed(self.wall, name)

    # ------------------------------------------------------------------------------------------------ inside
    def _train(self, stop_at: int | None) -> str:
        phases = self.plan.recipe.phases
        for name in phases[phases.index(self.state.clock.phase) :]:
            if name != self.state.clock.phase:
                self._next(name)
            if self._enter:
                self._enter_phase(name)
            with tensor_cores(getattr(self.state.sae.machine.ops, "compute", "float32")):
                reached = self._through(name, stop_at)
            if not reached:
                return "stopped"
        return "done"

    def _next(self, name: str) -> None:
        self.state.sae.machine.replay.forget()  # an ended phase's step: memory that nobody will use
        self.state.clock = self.state.clock.next_phase(name)
        self.state.phase = to(self.plan.recipe.phase[name].init(self.plan), self.state.device)
        self.readings = 0
        self._enter = True

    def _enter_phase(self, name: str) -> None:
        with _timed(self.wall, name, minus=("harvest",)):
            self.plan.recipe.phase[name].enter(self.plan, self.state)
        self._enter = False
        self.hooks.spalf_phase_entered(run=self, name=name)

    def _through(self, name: str, stop_at: int | None) -> bool:
        """Steps of one phase until it is done; False where the run was asked to stop."""
        phase = self.plan.recipe.phase[name]
        while not self._done(name):
            if self._stop or (stop_at is not None and self.state.clock.step >= stop_at):
                self.save()
                return False
            with _timed(self.wall, name, minus=("harvest",)):
                reading = phase.step(self.plan, self.state)
            self.readings += 1
            self._since_save += 1
            self._check(reading)
            self.hooks.spalf_stepped(run=self, reading=reading)
            if self._since_save >= self.plan.recipe.record.save_every:
                self.save()
        self.save()
        return True

    def _done(self, name: str) -> bool:
        clock = self.state.clock
        asked = clock.exhausted or clock.step % ASK_EVERY == 0
        return asked and self.plan.recipe.phase[name].done(self.plan, self.state)

    def _check(self, reading: Reading) -> None:
        """Raises DivergedError that names what is not finite; on a device it looks only when a line is logged.

        Parameters are looked at then too: a NaN in the encoder opens no gate, so a compact code does not list it.
        """
        is_logged = self.readings % self.plan.recipe.record.log_every == 0
        if not is_logged and self.state.device.type == "cuda":
            return
        bad = [name for name, value in reading.values.items() if not bool(torch.isfinite(value))]
        for kind, value_M in reading.per_constraint.items():
            bad += [f"{kind} of {n}" for n, v in zip(reading.names, value_M, strict=True) if not _finite(v)]
        if is_logged:
            bad += [f"parameter {n}" for n, p in self.state.sae.named_parameters() if not _finite(p.detach().sum())]
        if bad:
            raise checkpoint.diverged(self.directory / "checkpoints", reading.step, reading.phase, bad)


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value)) if value.is_floating_point() else True


@contextmanager
def stopping(run: Run) -> Iterator[None]:
    """SIGTERM and SIGINT ask for a checkpoint and an end; a second one is taken at its word.

    Once training is over there is nothing left to save: the block is left by Interrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, _: object) -> None:
        run.stop()
        signal.signal(number, before[signal.Signals(number)])
        if run.outcome != "running":
            raise Interrupt

    for s in before:
        signal.signal(s, ask)
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextmanager
def _timed(wall: dict[str, float], name: str, minus: tuple[str, ...] = ()) -> Iterator[None]:
    """Add the seconds of a block to `wall[name]`, less what the block added to the parts in `minus`."""
    before = sum(wall.get(m, 0.0) for m in minus)
    begin = time.perf_counter()
    try:
        yield
    finally:
        other = sum(wall.get(m, 0.0) for m in minus) - before
        wall[name] = wall.get(name, 0.0) + time.perf_counter() - begin - other
