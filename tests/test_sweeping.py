"""Sweeps: the grid, what is trained again and what is not, and the plot."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from spalf import hookimpl, launch
from spalf.cli import app
from spalf.errors import DivergedError, RecipeError
from spalf.sweeping import Point, points, sweep
from spalf.sweeping.plot import Mark, panels, pareto, svg, ticks

pytestmark = pytest.mark.usefixtures("few_rows")

SHORT = ["budget.tokens=2560", "record.log_every=5"]
GRID = ["knobs.R2_target=0.7,0.8", "seed=1,2"]
NAMES = ["R2_target-0.7+seed-1", "R2_target-0.7+seed-2", "R2_target-0.8+seed-1", "R2_target-0.8+seed-2"]


@pytest.fixture(scope="module")
def swept(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep, to be looked at only."""
    out = tmp_path_factory.mktemp("sweeps") / "toy"
    assert sweep(recipe, over=GRID, sets=SHORT, out=out, device="cpu").outcome == "done"
    return out


def told() -> tuple[list[str], Callable[[Point, int, int, str], None]]:
    """What `begin` is told, and the function to pass."""
    said: list[str] = []
    return said, lambda point, number, count, how: said.append(f"{number}/{count} {point.name} {how}")


# --------------------------------------------------------------------------------------------------------------- grid
def test_a_grid_is_every_combination_the_last_key_fastest() -> None:
    assert [p.name for p in points(GRID)] == NAMES
    assert points(GRID)[1].settings == {"knobs.R2_target": 0.7, "seed": 2}
    assert points(GRID)[1].sets == ["knobs.R2_target=0.7", "seed=2", 'name="R2_target-0.7+seed-2"']
    assert points(GRID)[1].label == "R2_target 0.7"
    assert points(["seed=1,2"])[0].label == "seed 1"


@pytest.mark.parametrize(
    ("over", "values"),
    [
        ("a.b=1, 2.5,true", [1, 2.5, True]),
        ("a.b=pi,ascent", ["pi", "ascent"]),
        ('a.b="x,y",z', ["x,y", "z"]),
        ("a.b=[1, 2],[3]", [[1, 2], [3]]),
        ('a.b={ use = "pi", kp = 0.5 },ascent', [{"use": "pi", "kp": 0.5}, "ascent"]),
    ],
)
def test_values_are_those_of_set(over: str, values: list[Any]) -> None:
    found = points([over])
    assert [p.settings["a.b"] for p in found] == values
    assert len({p.name for p in found}) == len(values)
    for point, value in zip(found, values, strict=True):
        from spalf.assembly import toml

        assert toml.setting(point.sets[0]) == {"a": {"b": value}}


def test_keys_of_one_last_name_are_told_apart() -> None:
    [point] = points(["term.l0.weight=1", "term.l1.weight=2"])
    assert point.name == "term.l0.weight-1+term.l1.weight-2"


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ([], "--over: is missing"),
        (["a"], "is not key=value"),
        (["a="], "is not key=value"),
        (["a=1,,2"], "has an empty value"),
        (["a=1,1"], "gives a-1 twice"),
        (["a=1", "a=2"], "--over a: is given twice"),
    ],
)
def test_a_wrong_grid(over: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        points(over)


# --------------------------------------------------------------------------------------------------------------- runs
@pytest.mark.slow
def test_a_sweep_leaves_runs_rows_and_a_plot(swept: Path) -> None:
    assert sorted(p.name for p in swept.iterdir()) == [*NAMES, "frontier.svg", "results.jsonl"]
    rows = [json.loads(line) for line in (swept / "results.jsonl").read_text().splitlines()]
    assert [row["point"] for row in rows] == NAMES
    for row in rows:
        summary = json.loads((swept / row["point"] / "summary.json").read_text())
        assert row["outcome"] == "done"
        assert row["l0"] == summary["l0"]
        assert row["r2_target"] == row["settings"]["knobs.R2_target"]
        assert row["l0.ci_low"] < row["l0"] < row["l0.ci_high"]
        assert row["seconds"] > 0
    assert len({row["l0"] for row in rows}) == 4, "every point is another run"
    ET.fromstring((swept / "frontier.svg").read_text())


@pytest.mark.slow
def test_a_finished_point_is_not_trained_again(recipe: Path, swept: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in swept.rglob("*") if p.is_file() and p.parent != swept}
    said, begin = told()
    again = sweep(recipe, over=GRID, sets=SHORT, out=swept, device="cpu", begin=begin)
    assert said == [f"{i}/4 {name} done" for i, name in enumerate(NAMES, 1)]
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before
    assert len(again.rows) == 4


class Stopper:
    """An observer that asks the run to stop at a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    @hookimpl
    def spalf_stepped(self, run: Any, reading: Any) -> None:
        if reading.phase == "fit" and reading.step == self._step:
            run.stop()


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_where_it_was(recipe: Path, swept: Path, tmp_path: Path) -> None:
    stopped = sweep(recipe, over=GRID, sets=SHORT, out=tmp_path, device="cpu", observers=[Stopper(7)])
    assert (stopped.outcome, stopped.rows) == ("stopped", ())
    assert [p.name for p in tmp_path.iterdir()] == NAMES[:1]
    said, begin = told()
    done = sweep(recipe, over=GRID, sets=SHORT, out=tmp_path, device="cpu", begin=begin)
    assert said[0] == f"1/4 {NAMES[0]} resume"
    assert said[1] == f"2/4 {NAMES[1]} train"
    uncut = [json.loads(line) for line in (swept / "results.jsonl").read_text().splitlines()]
    assert [row["l0"] for row in done.rows] == [row["l0"] for row in uncut], "cut and uncut runs are the same runs"


@pytest.mark.slow
def test_a_point_that_was_killed_before_a_checkpoint_starts_anew(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "seed-1"
    run.mkdir()
    (run / "metrics.jsonl").write_text("half a li")
    said, begin = told()
    sweep(recipe, over=["seed=1"], sets=SHORT, out=tmp_path, device="cpu", begin=begin)
    assert said == ["1/1 seed-1 train"]


@pytest.mark.slow
def test_a_point_that_fails_does_not_end_the_sweep(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = launch.run

    def run(*args: Any, sets: list[str], out: Path, **options: Any) -> Any:
        if "seed=1" in sets:
            (out / "seed-1").mkdir(parents=True)
            summary = {"outcome": "diverged", "notes": ["step 3: not finite"]}
            (out / "seed-1" / "summary.json").write_text(json.dumps(summary))
            raise DivergedError("step 3: not finite")
        return real(*args, sets=sets, out=out, **options)

    monkeypatch.setattr(launch, "run", run)
    swept = sweep(recipe, over=["seed=1,2"], sets=SHORT, out=tmp_path, device="cpu")
    assert [row["outcome"] for row in swept.rows] == ["diverged", "done"]
    assert swept.rows[0]["notes"] == ["step 3: not finite"]
    assert (tmp_path / "frontier.svg").read_text().count('<circle class="dot"') == 1


@pytest.mark.slow
def test_all_points_are_checked_before_one_is_trained(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        sweep(recipe, over=["knobs.R2_target=0.8,1.5", "knobs.lr=1e-3,-1.0"], out=tmp_path)
    said = str(caught.value)
    assert "R2_target-1.5+lr-0.001: knobs.R2_target" in said
    assert "R2_target-0.8+lr--1.0: knobs.lr" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_directory_of_another_sweep_is_refused(recipe: Path, swept: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe.toml: is another recipe than this point's \(give another --out\)"):
        sweep(recipe, over=GRID, sets=["budget.tokens=5120"], out=swept)


# --------------------------------------------------------------------------------------------------------------- plot
def mark(x: float, y: float) -> Mark:
    return Mark(label="", x=x, y=y, each=((x, y),))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12), st.booleans())
def test_the_front_is_what_nothing_beats(places: list[tuple[int, int]], rising: bool) -> None:
    marks = [mark(x, y) for x, y in places]
    front = {(m.x, m.y) for m in pareto(marks, rising)}

    def beats(a: Mark, b: Mark) -> bool:
        gain = a.y - b.y if rising else b.y - a.y
        return a.x <= b.x and gain >= 0 and (a.x < b.x or gain > 0)

    assert front == {(m.x, m.y) for m in marks if not any(beats(other, m) for other in marks)}


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_inside(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 8
    assert all(low - 0.01 * span <= t <= low + 1.01 * span for t in found)


def test_repetitions_are_averaged_and_single_points_have_bars() -> None:
    rows = [
        {"label": "R2 0.7", "l0": 10.0, "r2_raw": 0.70, "ce_gap": None},
        {"label": "R2 0.7", "l0": 12.0, "r2_raw": 0.72, "ce_gap": None},
        {"label": "R2 0.8", "l0": 20.0, "r2_raw": 0.80, "ce_gap": None, "r2_raw.ci_low": 0.79, "r2_raw.ci_high": 0.81},
    ]
    explained, lost = panels(rows)
    assert [(m.label, m.x, pytest.approx(m.y)) for m in explained.marks] == [
        ("R2 0.7", 11.0, 0.71),
        ("R2 0.8", 20.0, 0.8),
    ]
    assert [m.interval for m in explained.marks] == [None, (0.79, 0.81)]
    assert lost.marks == ()
    drawn = svg([explained, lost], "toy")
    assert drawn.count('class="dot"') == 2
    assert drawn.count('class="one"') == 2
    assert drawn.count('class="bar"') == 1
    assert "What the model loses" not in drawn, "a source without a model has one panel"


def test_text_is_escaped_and_nothing_is_no_plot() -> None:
    hostile = [{"label": '</svg><script>"&', "l0": 1.0, "r2_raw": 0.5, "ce_gap": None}]
    root = ET.fromstring(svg(panels(hostile), "<toy>"))
    assert [e.tag for e in root.iter() if e.tag.endswith("script")] == []
    assert "no point has been measured yet" in svg(panels([]), "toy")


# ------------------------------------------------------------------------------------------------------- command line
@pytest.mark.slow
def test_the_command_tells_points_rows_and_files(recipe: Path, swept: Path) -> None:
    words = ["sweep", str(recipe), *(w for o in GRID for w in ("--over", o)), *(w for s in SHORT for w in ("--set", s))]
    shown = CliRunner().invoke(app, [*words, "--out", str(swept), "--device", "cpu"], env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    assert f"point 2 of 4: {NAMES[1]} is there" in shown.stderr
    assert any(line.split()[:1] == [NAMES[3]] for line in shown.stdout.splitlines())
    assert "frontier.svg" in shown.stderr
    as_json = CliRunner().invoke(app, [*words, "--out", str(swept), "--json", "--quiet"])
    assert [row["point"] for row in json.loads(as_json.stdout)["points"]] == NAMES
    wrong = CliRunner().invoke(app, ["sweep", str(recipe), "--over", "knobs.lrr=1", "--out", str(swept)])
    assert wrong.exit_code == 2
    assert 'knobs.lrr: unknown key (did you mean "lr"?)' in wrong.stderr
