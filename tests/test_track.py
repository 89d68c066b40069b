"""Trackers: they copy what metrics.jsonl holds, never twice, and cannot stop a run."""

from __future__ import annotations

import csv
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from spalf import hookimpl, hooks, launch, plugins
from spalf.errors import ComponentError, RecipeError
from spalf.track import Tracking, flat

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_rows")]  # together more than `make check` has time for

SHORT = ["budget.tokens=2560", "record.log_every=3", "record.save_every=5", "record.keep=9"]
BOTH = 'record.track=["csv","tensorboard"]'


def run(recipe: Path, out: Path, *sets: str, **options: Any) -> Path:
    return launch.run(recipe, sets=[*SHORT, *sets], out=out, device="cpu", **options).directory


@pytest.fixture(scope="module")
def tracked(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run with both trackers, to be looked at only."""
    return run(recipe, tmp_path_factory.mktemp("tracked"), BOTH)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same_as_the_lines(directory: Path) -> None:
    """Every row of metrics.csv is a line of metrics.jsonl, in the same order, to the last bit."""
    told = [{k: v for k, v in row.items() if v != ""} for row in rows(directory)]
    assert told == [{k: str(v) for k, v in flat(line).items() if v is not None} for line in lines(directory)]


def events(directory: Path, phase: str) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads from a phase's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(directory / "trackers" / "tensorboard" / phase), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def same_as_the_lines_of(directory: Path, phase: str) -> None:
    mine = [line for line in lines(directory) if line["phase"] == phase]
    found = events(directory, phase)
    tags = {name for line in mine for name, v in flat(line).items() if isinstance(v, int | float)} - {"step"}
    assert set(found) == {tag.replace(".", "/") for tag in tags}
    for tag in tags:
        expected = [(line["step"], float(flat(line)[tag])) for line in mine if tag in flat(line)]
        steps, values = zip(*expected, strict=True)
        if phase == "calibrate":  # takes no step: its lines are counted
            steps = tuple(3 * (i + 1) for i in range(len(mine)))
        assert [s for s, _ in found[tag.replace(".", "/")]] == list(steps), tag
        assert [v for _, v in found[tag.replace(".", "/")]] == pytest.approx(list(values), rel=1e-6), tag


# ------------------------------------------------------------------------------------------------------- csv
def test_csv_has_every_line_and_every_number(tracked: Path) -> None:
    same_as_the_lines(tracked)
    head = (tracked / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"step", "phase", "change", "loss", "term.l0", "constraints.faithfulness.lam"} <= set(head)
    assert len({line["phase"] for line in lines(tracked)}) == 2, "phases have columns of their own"


def test_a_resumed_run_writes_no_row_twice(recipe: Path, tmp_path: Path, tracked: Path) -> None:
    """From an older checkpoint: what came behind it is written again, by both."""
    directory = run(recipe, tmp_path, BOTH)
    launch.resume(directory, checkpoint="spalf_fit_step10", device="cpu")
    same_as_the_lines(directory)
    assert rows(directory) == rows(tracked)
    for phase in ("calibrate", "fit"):
        same_as_the_lines_of(directory, phase)
        assert events(directory, phase) == events(tracked, phase)


def test_tracking_may_begin_on_resume(recipe: Path, tmp_path: Path) -> None:
    directory = run(recipe, tmp_path, stop_at=12)
    assert not (directory / "metrics.csv").exists()
    launch.resume(directory, sets=[BOTH], device="cpu")
    same_as_the_lines(directory)
    assert {s for found in events(directory, "fit").values() for s, _ in found} == {15, 18}


# --------------------------------------------------------------------------------------------------- tensorboard
@pytest.mark.parametrize("phase", ["calibrate", "fit"])
def test_tensorboard_reads_every_number(tracked: Path, phase: str) -> None:
    same_as_the_lines_of(tracked, phase)


def test_what_a_later_phase_left_is_hidden_once_an_earlier_one_goes_on(
    recipe: Path, tmp_path: Path, tracked: Path
) -> None:
    directory = run(recipe, tmp_path, BOTH)
    first = sorted(p.name for p in (directory / "checkpoints").iterdir() if "calibrate" in p.name)
    launch.resume(directory, checkpoint=first[0], device="cpu", stop_at=7)
    assert [s for s, _ in events(directory, "fit")["loss"]] == [3, 6]
    launch.resume(directory, device="cpu")
    assert events(directory, "fit") == events(tracked, "fit")


def test_without_its_package_tensorboard_says_how_to_get_it(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ComponentError, match=r'"tensorboard" needs a package .*pip install "spalf\[tensorboard\]"'):
        run(recipe, tmp_path, BOTH)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- choosing them
def test_nothing_is_tracked_unless_asked_for(recipe: Path, tmp_path: Path) -> None:
    names = {p.name for p in run(recipe, tmp_path, stop_at=6).iterdir()}
    assert names.isdisjoint({"metrics.csv", "trackers"})
    assert "metrics.jsonl" in names


def test_an_unknown_tracker_is_refused_before_anything_is_written(recipe: Path, tmp_path: Path) -> None:
    for call in (lambda s: run(recipe, tmp_path, s), lambda s: launch.compile_recipe(recipe, [s])):
        with pytest.raises(RecipeError, match=r'record.track: no tracker is called "cvs" \(did you mean "csv"\?\)'):
            call('record.track=["cvs"]')
    assert list(tmp_path.iterdir()) == []


def test_trackers_change_no_number(recipe: Path, tmp_path: Path, tracked: Path) -> None:
    plain = run(recipe, tmp_path)
    assert lines(plain) == lines(tracked)
    for file in ("model", "optimizer", "control", "tensors"):
        name = Path("checkpoints") / "spalf_fit_step20" / f"{file}.safetensors"
        assert (plain / name).read_bytes() == (tracked / name).read_bytes()


def test_a_replaced_run_leaves_no_trace_with_its_trackers(recipe: Path, tmp_path: Path) -> None:
    directory = run(recipe, tmp_path, BOTH)
    run(recipe, tmp_path, force=True)
    assert {p.name for p in directory.iterdir()}.isdisjoint({"metrics.csv", "trackers"})


class Shop:
    """A plugin that offers what it is given."""

    def __init__(self, offer: Any) -> None:
        self.offer = offer

    @hookimpl
    def spalf_trackers(self) -> Any:
        if isinstance(self.offer, Exception):
            raise self.offer
        return self.offer


@pytest.mark.parametrize(
    ("offer", "said"),
    [
        ({"csv": print}, 'tracker "csv" is offered twice'),
        (["mine"], "returns no dictionary of functions"),
        ({"mine": 3}, "returns no dictionary of functions"),
        (ValueError("no network"), "failed: ValueError: no network"),
    ],
)
def test_a_plugin_s_trackers_are_checked(offer: Any, said: str) -> None:
    manager, _ = plugins.load()
    manager.register(Shop(offer), name="shop")
    with pytest.raises(ComponentError, match=said):
        plugins.trackers(manager, ["csv"])


def test_trackers_come_in_the_order_asked_for() -> None:
    manager, _ = plugins.load()
    manager.register(Shop({"mine": dict}), name="shop")
    assert list(plugins.trackers(manager, ["tensorboard", "mine", "csv"])) == ["tensorboard", "mine", "csv"]
    assert plugins.trackers(manager, []) == {}


# ------------------------------------------------------------------------------------------------- their failures
class Failing:
    """A tracker that fails at its second line."""

    def __init__(self) -> None:
        self.told: list[str] = []

    @hookimpl
    def spalf_phase_entered(self, name: str) -> None:
        self.told.append(name)

    @hookimpl
    def spalf_logged(self, index: int) -> None:
        self.told.append(f"line {index}")
        if index == 1:
            raise ConnectionError("no route to host")

    @hookimpl
    def spalf_ended(self, summary: Any) -> None:
        self.told.append(summary["outcome"])


def test_a_tracker_that_fails_stops_alone(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, tracked: Path
) -> None:
    failing = Failing()
    with caplog.at_level(logging.WARNING, "spalf"):
        directory = run(recipe, tmp_path, observers=[Tracking("mine", failing)])
    assert lines(directory) == lines(tracked)
    assert failing.told == ["calibrate", "line 0", "line 1"]
    assert [r.getMessage() for r in caplog.records] == [
        "tracker mine has stopped, the run goes on: ConnectionError: no route to host"
    ]


def test_a_tracker_may_have_any_of_the_hooks() -> None:
    class Every:
        def __init__(self) -> None:
            self.told: list[str] = []

        @hookimpl
        def spalf_stepped(self, run: Any) -> None:
            self.told.append("stepped")

        @hookimpl
        def spalf_saved(self, path: Any) -> None:
            self.told.append("saved")

    every = Every()
    manager = hooks.manager()
    manager.register(Tracking("every", every))
    manager.hook.spalf_stepped(run=None, reading=None)
    manager.hook.spalf_saved(run=None, path=None)
    manager.hook.spalf_ended(run=None, summary={})
    assert every.told == ["stepped", "saved"]


# ----------------------------------------------------------------------------------------------- the end of a run
def test_every_end_is_told_with_its_summary(recipe: Path, tmp_path: Path) -> None:
    class Last:
        told: list[tuple[str, bool]] = []  # noqa: RUF012

        @hookimpl
        def spalf_ended(self, run: Any, summary: Any) -> None:
            written = json.loads((run.directory / "summary.json").read_text())
            self.told.append((summary["outcome"], written["outcome"] == summary["outcome"]))

        @hookimpl
        def spalf_stepped(self, reading: Any) -> None:
            if reading.step == 15:
                raise OSError("no space")

    directory = run(recipe, tmp_path, stop_at=8, observers=[Last()])
    with pytest.raises(OSError, match="no space"):
        launch.resume(directory, device="cpu", observers=[Last()])
    assert Last.told == [("stopped", True), ("failed", True)]


def test_flat_names_are_dotted() -> None:
    assert flat({"step": 1, "constraints": {"drift": {"g": 0.5, "on": True}}, "phase": "fit"}) == {
        "step": 1,
        "constraints.drift.g": 0.5,
        "constraints.drift.on": True,
        "phase": "fit",
    }
