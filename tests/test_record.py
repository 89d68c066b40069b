"""The record of a run: complete, whole, and without duplicates after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import evolve

from spalf.core.recipe import Budget, Derived, Knobs, Plan, Recipe, Record
from spalf.core.slots import activation
from spalf.core.values import Clock, Facts, Reading
from spalf.record import Recorder, plain, write_json, write_whole


@activation("stub")
class Stub:
    """An activation that is only ever written down."""

    bandwidth: float = 0.1

    def build(self, width: int) -> Any:
        raise AssertionError("a recorder builds nothing")


def make_plan(log_every: int = 2) -> Plan:
    one: Any = Stub()
    recipe = Recipe(
        name="small",
        phases=("calibrate", "fit"),
        strata=("free",),
        knobs=Knobs(F=8, L0_target=2),
        budget=Budget(tokens=64, batch=4),
        record=Record(log_every=log_every),
        **dict.fromkeys(
            ["source", "whitener", "activation", "filter", "dual", "penalty", "lagrangian", "optimizer", "kernel"],
            one,
        ),
        **{slot: {"a": one} for slot in ["stratum", "term", "constraint", "phase", "evaluator"]},
    )
    return Plan(
        recipe=recipe,
        facts=Facts(d_model=4, provides=frozenset({"tokens", "activations"})),
        knobs=recipe.knobs,
        rows={"free": 8},
        total_steps=16,
        terms=("l0",),
        constraints=("faithfulness",),
        derived=(Derived(path="F", value=8.0, formula="2 * d_model", origin="knobs.F = 0"),),
    )


def reading(step: int, phase: str = "fit", **values: float) -> Reading:
    return Reading(
        step=step,
        phase=phase,
        names=("faithfulness",),
        values={k: torch.tensor(v) for k, v in values.items()},
        per_constraint={"g": torch.tensor([0.5])},
    )


def a_run(step: int, readings: int | None = None) -> Any:
    """A run at `step`, after `readings` steps of its phase: all of them, unless said."""
    state = SimpleNamespace(clock=Clock(step=step, total=16))
    told: list[tuple[int, dict[str, Any]]] = []
    return SimpleNamespace(
        state=state,
        readings=step if readings is None else readings,
        told=told,
        hooks=SimpleNamespace(spalf_logged=lambda run, line, index: told.append((index, line))),
    )


def drive(recorder: Recorder, first: int, last: int) -> None:
    for step in range(first, last + 1):
        recorder.spalf_stepped(a_run(step), reading(step, loss=float(step)))


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]


def test_recipe_and_plan_are_written_at_once(tmp_path: Path) -> None:
    Recorder(tmp_path / "run", make_plan(), 'name = "small"\n')
    assert (tmp_path / "run" / "recipe.toml").read_text() == 'name = "small"\n'
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["recipe"]["activation"] == {"use": "stub", "bandwidth": 0.1}
    assert plan["facts"]["provides"] == ["activations", "tokens"]
    assert plan["derived"] == [{"path": "F", "value": 8.0, "formula": "2 * d_model", "origin": "knobs.F = 0"}]
    assert plan["rows"] == {"free": 8}
    assert plan["total_steps"] == 16


def test_a_line_every_log_every_steps(tmp_path: Path) -> None:
    drive(Recorder(tmp_path, make_plan(log_every=3), ""), 1, 10)
    assert [line["step"] for line in lines(tmp_path)] == [3, 6, 9]
    assert lines(tmp_path)[0] == {"step": 3, "phase": "fit", "loss": 3.0, "constraints": {"faithfulness": {"g": 0.5}}}


def test_lines_count_from_the_phase_s_first_step(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, make_plan(log_every=4), "")
    for step in range(6, 15):
        recorder.spalf_stepped(a_run(step, step - 5), reading(step))
    assert [line["step"] for line in lines(tmp_path)] == [9, 13]


def test_a_phase_without_steps_is_counted_by_readings(tmp_path: Path) -> None:
    """And a resumed one goes on counting where the run was cut, here after three."""
    first, second = (Recorder(tmp_path, make_plan(log_every=2), "") for _ in range(2))
    for i in range(1, 8):
        recorder = first if i <= 3 else second
        recorder.spalf_stepped(a_run(0, i), reading(0, "calibrate", tokens=100.0 * i))
    assert [line["tokens"] for line in lines(tmp_path)] == [200.0, 400.0, 600.0]


@pytest.mark.parametrize("cut", [1, 4, 7, 10])
def test_resuming_writes_no_line_twice(tmp_path: Path, cut: int) -> None:
    drive(Recorder(tmp_path / "whole", make_plan(), ""), 1, 12)
    drive(Recorder(tmp_path / "cut", make_plan(), ""), 1, 10)
    drive(Recorder(tmp_path / "cut", make_plan(), ""), cut + 1, 12)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 4, 7, 10])
def test_observers_get_each_line_with_its_place_in_the_file(tmp_path: Path, cut: int) -> None:
    drive(Recorder(tmp_path, make_plan(), ""), 1, 10)
    again = Recorder(tmp_path, make_plan(), "")
    for step in range(cut + 1, 13):
        run = a_run(step)
        again.spalf_stepped(run, reading(step, loss=float(step)))
        written = lines(tmp_path)
        assert run.told == ([(len(written) - 1, written[-1])] if step % 2 == 0 else [])


def test_resuming_after_calibration_keeps_its_lines(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, make_plan(log_every=1), "")
    recorder.spalf_stepped(a_run(0), reading(0, "calibrate", tokens=100.0))
    recorder.spalf_stepped(a_run(1), reading(1))
    again = Recorder(tmp_path, make_plan(log_every=1), "")
    again.spalf_stepped(a_run(1), reading(1))
    assert [(line["phase"], line["step"]) for line in lines(tmp_path)] == [("calibrate", 0), ("fit", 1)]


def test_a_torn_last_line_is_dropped_on_resume(tmp_path: Path) -> None:
    drive(Recorder(tmp_path, make_plan(), ""), 1, 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "pha')
    drive(Recorder(tmp_path, make_plan(), ""), 5, 6)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]


def test_only_due_steps_wait_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    scalars = Reading.scalars

    def counted(self: Reading) -> dict[str, Any]:
        asked.append(self.step)
        return scalars(self)

    monkeypatch.setattr(Reading, "scalars", counted)
    drive(Recorder(tmp_path, make_plan(log_every=5), ""), 1, 12)
    assert asked == [5, 10]


def test_summary_is_strict_json(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, make_plan(), "")
    recorder.write_summary({"l0": 3.5, "kl": float("nan"), "wall_seconds": {"fit": float("inf")}})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"l0": 3.5, "kl": None, "wall_seconds": {"fit": None}}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"l0": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "half")
    assert json.loads(path.read_text()) == {"l0": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="Tensor"):
        plain({"x": torch.zeros(2)})


def test_a_changed_plan_is_written_again(tmp_path: Path) -> None:
    plan = make_plan()
    Recorder(tmp_path, plan, "")
    Recorder(tmp_path, evolve(plan, total_steps=32), "")
    assert json.loads((tmp_path / "plan.json").read_text())["total_steps"] == 32
