"""Progress of a run on stderr: live bars on a terminal, one short line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from attrs import define, field
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from spalf.cli.numbers import MISSING, clock, number, rate, signed
from spalf.cli.render import plain_table
from spalf.core.values import Reading
from spalf.hooks import hookimpl

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

LINE_EVERY = 10.0  # seconds
DRAW_EVERY = 0.25
WINDOW = 30.0  # seconds that a rate is measured over


@define
class Meter:
    """Where a run is and how fast it goes. Waits for the device only at steps that `record.log_every` counts."""

    now: Callable[[], float] = time.monotonic
    phase: str = ""
    step: int = 0
    total: int = 0
    batch: int = 1
    seen: float = 0.0
    """Activations: of the whole run while steps are taken, of this phase where none is (calibration)."""
    latest: Mapping[str, Any] = field(factory=dict)
    _marks: deque[tuple[float, float]] = field(factory=deque)
    _readings: int = 0

    def enter(self, plan: Any, name: str) -> None:
        """A phase begins; the numbers of the one before no longer hold."""
        self.phase, self.total, self.batch = name, plan.total_steps, plan.recipe.budget.batch
        self.latest, self.seen, self._readings = {}, 0.0, 0
        self._marks.clear()

    def take(self, run: Any, reading: Reading) -> None:
        """One step."""
        if reading.phase != self.phase:
            self.enter(run.plan, reading.phase)
        self.total, self.step = run.plan.total_steps, reading.step
        entered = run.state.clock.entered
        every = run.plan.recipe.record.log_every
        still = reading.step == entered
        if (self._readings if still else reading.step - entered) % every == 0 or not self._readings:
            self.latest = reading.scalars()
        self._readings += 1
        self.seen = float(self._readings if still else reading.step) * self.batch
        self._mark()

    def _mark(self) -> None:
        at = self.now()
        self._marks.append((at, self.seen))
        while len(self._marks) > 2 and at - self._marks[1][0] >= WINDOW:
            self._marks.popleft()

    def rate(self) -> float | None:
        """Activations per second over the last half minute."""
        if len(self._marks) < 2:
            return None
        (t0, n0), (t1, n1) = self._marks[0], self._marks[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else None

    def eta(self) -> float | None:
        """Seconds to the end of the budget at this rate; None while no step has been taken."""
        speed = self.rate()
        if not speed or not self.step:
            return None
        return max(0.0, self.total - self.step) * self.batch / speed

    def headline(self) -> str:
        """Phase, step, rate, ETA."""
        if not self.step:
            change = self.latest.get("change")
            tail = "" if change is None else f"  covariance change {number(change, 3)}"
            return f"[{self.phase}] {number(int(self.seen))} activations  {rate(self.rate())}{tail}"
        done = f"step {self.step}/{self.total} ({100 * self.step / max(1, self.total):.1f} %)"
        return f"[{self.phase}] {done}  {rate(self.rate())}  ETA {clock(self.eta())}"

    def figures(self) -> str:
        """L0 and R2 of the latest logged step; "" in a phase that has none."""
        if "l0" not in self.latest:
            return ""
        raw, white = self.latest.get("r2_raw"), self.latest.get("r2_white")
        r2 = f"R2 {_three(raw)} raw {_three(white)} white" if white is not None else f"R2 {_three(raw)}"
        return f"L0 {number(self.latest.get('l0'), 3)}  {r2}"

    def constraints(self) -> dict[str, Mapping[str, float]]:
        """The active constraints of the latest logged step."""
        found: Mapping[str, Mapping[str, float]] = self.latest.get("constraints") or {}
        return {name: one for name, one in found.items() if one.get("on", True)}

    def line(self) -> str:
        """All of it, for a log."""
        parts = [f"{n} {signed(_violation(one))} x{number(one.get('lam'), 3)}" for n, one in self.constraints().items()]
        return "  ".join(part for part in (self.headline(), self.figures(), *parts) if part)


def _three(x: Any) -> str:
    return MISSING if x is None else f"{x:.3f}"


def _violation(one: Mapping[str, float]) -> float | None:
    """The filtered violation, which controllers see; the batch's own where there is none."""
    return one.get("fast", one.get("g"))


class Lines:
    """An observer for logs and pipes."""

    def __init__(self, write: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._write, self._now = write, now
        self._meter = Meter(now)
        self._said = now()

    @hookimpl
    def spalf_phase_entered(self, run: Any, name: str) -> None:
        self._meter.enter(run.plan, name)
        self._write(f"[{name}] begins at step {run.state.clock.step}")
        self._said = self._now()

    @hookimpl
    def spalf_stepped(self, run: Any, reading: Reading) -> None:
        self._meter.take(run, reading)
        if self._now() - self._said >= LINE_EVERY:
            self._write(self._meter.line())
            self._said = self._now()


class Bars:
    """An observer for terminals: a bar, the figures, and a row per constraint, handed to `draw`."""

    def __init__(self, draw: Callable[[RenderableType], None], now: Callable[[], float] = time.monotonic) -> None:
        self._draw, self._now = draw, now
        self._meter = Meter(now)
        self._drawn = now()

    @hookimpl
    def spalf_phase_entered(self, run: Any, name: str) -> None:
        self._meter.enter(run.plan, name)
        self._draw(self.render())

    @hookimpl
    def spalf_stepped(self, run: Any, reading: Reading) -> None:
        self._meter.take(run, reading)
        if self._now() - self._drawn >= DRAW_EVERY:
            self._draw(self.render())
            self._drawn = self._now()

    def render(self) -> RenderableType:
        """What the terminal shows now."""
        meter = self._meter
        bar = ProgressBar(total=max(1, meter.total), completed=meter.step, width=20, pulse=not meter.step)
        top = Table.grid(padding=(0, 1))
        top.add_row(bar, Text(meter.headline()))
        top.add_row("", Text(meter.figures()))
        constraints = meter.constraints()
        if not constraints:
            return top
        rows = [
            (name, signed(_violation(one)), number(one.get("lam"), 3), number(one.get("rho"), 3))
            for name, one in constraints.items()
        ]
        return Group(top, plain_table(["constraint", "violation", "multiplier", "penalty"], rows, right=(1, 2, 3)))


@contextmanager
def progress(console: Console) -> Iterator[object]:
    """An observer that shows a run on `console` until the block ends."""
    if not console.is_terminal:
        yield Lines(lambda text: console.print(text, soft_wrap=True))
        return
    # Drawn from the training thread: a thread of its own would read numbers that are being changed.
    with Live(Text("preparing ..."), console=console, auto_refresh=False) as live:
        yield Bars(lambda drawn: live.update(drawn, refresh=True))
