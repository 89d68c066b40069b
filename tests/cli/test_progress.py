"""Progress: right rates and remaining times, sparing with the device, short where nobody watches."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from spalf.cli.progress import Bars, Lines, Meter, progress
from spalf.core.values import Clock, Reading


class Watch:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def a_run(step: int = 0, entered: int = 0, log_every: int = 10) -> Any:
    record = SimpleNamespace(log_every=log_every)
    recipe = SimpleNamespace(budget=SimpleNamespace(batch=64), record=record)
    plan = SimpleNamespace(recipe=recipe, total_steps=1000)
    return SimpleNamespace(plan=plan, state=SimpleNamespace(clock=Clock(step=step, total=1000, entered=entered)))


def reading(step: int, phase: str = "fit", off: bool = False) -> Reading:
    values = {"loss": 1.0, "l0": 31.5}
    if step % 10 == 0:
        values |= {"r2_raw": 0.9123, "r2_white": 0.8}
    return Reading(
        step=step,
        phase=phase,
        names=("faithfulness", "drift"),
        values={k: torch.tensor(v) for k, v in values.items()},
        per_constraint={
            "g": torch.tensor([0.5, -0.1]),
            "fast": torch.tensor([0.125, -0.25]),
            "lam": torch.tensor([1.5, 0.0]),
            "rho": torch.tensor([1.0, 2.0]),
            "on": torch.tensor([True, not off]),
        },
    )


def calibration(tokens: float, at: int = 0) -> Reading:
    return Reading(step=at, phase="calibrate", values={"tokens": torch.tensor(tokens), "change": torch.tensor(0.02)})


def drive(observer: Any, watch: Watch, first: int, last: int, seconds: float = 0.5) -> None:
    for step in range(first, last + 1):
        watch.at += seconds
        if isinstance(observer, Meter):
            observer.take(a_run(step), reading(step))
        else:
            observer.spalf_stepped(a_run(step), reading(step))


def test_rate_and_remaining_time() -> None:
    watch = Watch()
    meter = Meter(watch)
    drive(meter, watch, 1, 20)
    assert meter.rate() == pytest.approx(64 / 0.5)
    assert meter.eta() == pytest.approx((1000 - 20) * 0.5)


def test_a_rate_forgets_what_is_long_ago() -> None:
    watch = Watch()
    meter = Meter(watch)
    drive(meter, watch, 1, 40, seconds=5.0)
    drive(meter, watch, 41, 140, seconds=0.5)
    assert meter.rate() == pytest.approx(64 / 0.5, rel=0.02)


def test_a_resumed_run_has_a_rate_of_its_own() -> None:
    watch = Watch()
    meter = Meter(watch)
    drive(meter, watch, 501, 510)
    assert meter.rate() == pytest.approx(64 / 0.5)
    assert "step 510/1000 (51.0 %)" in meter.headline()


def test_the_device_is_asked_at_logged_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    scalars = Reading.scalars

    def counted(self: Reading) -> dict[str, Any]:
        asked.append(self.step)
        return scalars(self)

    monkeypatch.setattr(Reading, "scalars", counted)
    watch = Watch()
    drive(Meter(watch), watch, 1, 35)
    assert asked == [1, 10, 20, 30]


def test_a_line_holds_all_that_is_asked_for() -> None:
    watch = Watch()
    meter = Meter(watch)
    drive(meter, watch, 1, 10)
    assert meter.line() == (
        "[fit] step 10/1000 (1.0 %)  128/s  ETA 8:15  L0 31.5  R2 0.912 raw 0.800 white"
        "  faithfulness +0.125 x1.5  drift -0.250 x0"
    )


def test_a_constraint_that_is_off_is_not_shown() -> None:
    meter = Meter(Watch())
    meter.take(a_run(10), reading(10, off=True))
    assert list(meter.constraints()) == ["faithfulness"]


def test_calibration_counts_activations() -> None:
    watch = Watch()
    meter = Meter(watch)
    for i in range(11):
        watch.at += 2.0
        meter.take(a_run(), calibration(64.0 * (i + 1)))
    assert meter.line() == "[calibrate] 704 activations  32/s  covariance change 0.02"


def test_a_log_gets_a_line_every_ten_seconds_and_at_each_phase() -> None:
    watch, lines = Watch(), list[str]()
    observer = Lines(lines.append, watch)
    observer.spalf_phase_entered(a_run(), "calibrate")
    observer.spalf_stepped(a_run(), calibration(64.0))
    observer.spalf_phase_entered(a_run(), "fit")
    drive(observer, watch, 1, 60)
    assert [line.split("  ")[0] for line in lines] == [
        "[calibrate] begins at step 0",
        "[fit] begins at step 0",
        "[fit] step 20/1000 (2.0 %)",
        "[fit] step 40/1000 (4.0 %)",
        "[fit] step 60/1000 (6.0 %)",
    ]


def test_numbers_of_the_phase_before_are_dropped() -> None:
    watch, lines = Watch(), list[str]()
    observer = Lines(lines.append, watch)
    drive(observer, watch, 1, 10)
    observer.spalf_phase_entered(a_run(10, entered=10), "causal")
    watch.at += 11.0
    observer.spalf_stepped(a_run(11, entered=10), reading(11, "causal"))
    assert lines[-1].startswith("[causal] step 11/1000 (1.1 %)  -  ETA -  L0 31.5  R2 -")


def screen(observer: Bars) -> str:
    out = io.StringIO()
    Console(file=out, width=140).print(observer.render())
    return out.getvalue()


def test_a_terminal_shows_a_row_per_constraint() -> None:
    watch, drawn = Watch(), list[Any]()
    observer = Bars(drawn.append, watch)
    observer.spalf_phase_entered(a_run(), "fit")
    drive(observer, watch, 1, 10, seconds=0.1)
    shown = [" ".join(line.split()) for line in screen(observer).splitlines()]
    assert "step 10/1000 (1.0 %)" in shown[0]
    assert "faithfulness +0.125 1.5 1" in shown
    assert "drift -0.250 0 2" in shown
    assert 1 < len(drawn) <= 1 + 10 * 0.1 / 0.25


def test_the_kind_of_output_decides() -> None:
    pipe = io.StringIO()
    with progress(Console(file=pipe, width=20, markup=False, highlight=False)) as observer:
        assert isinstance(observer, Lines)
        observer.spalf_phase_entered(a_run(), "fit")
    assert pipe.getvalue() == "[fit] begins at step 0\n"
    tty = io.StringIO()
    with progress(Console(file=tty, force_terminal=True, width=100)) as observer:
        assert isinstance(observer, Bars)
        observer.spalf_phase_entered(a_run(), "fit")
    assert "preparing ..." in tty.getvalue()
    assert "[fit]" in tty.getvalue()
