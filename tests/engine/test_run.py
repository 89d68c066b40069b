"""A run: phases in order, entered once, saved when due; observers told; time accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pluggy
import pytest
import torch
from attrs import evolve

from spalf import hookimpl, hooks
from spalf.core.recipe import Plan
from spalf.core.tree import flatten
from spalf.engine import checkpoint
from spalf.engine.run import Run, TimedStream
from spalf.errors import CheckpointError, DivergedError, RecipeError
from spalf.testing import toy_plan
from spalf.testing.toy import ToyStream
from spalf.testing.whole import CPU, moved, snapshot


class Notes:
    """An observer that writes everything down."""

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.steps: list[tuple[str, int, int]] = []
        self.saved: list[str] = []

    @hookimpl
    def spalf_phase_entered(self, run: Any, name: str) -> None:
        self.entered.append(name)

    @hookimpl
    def spalf_stepped(self, run: Any, reading: Any) -> None:
        self.steps.append((reading.phase, reading.step, run.readings))

    @hookimpl
    def spalf_saved(self, run: Any, path: Path) -> None:
        assert (path / "metadata.json").is_file()
        self.saved.append(path.name)


def caller(*observers: object) -> Any:
    manager = pluggy.PluginManager("spalf")
    manager.add_hookspecs(hooks)
    for one in observers:
        manager.register(one)
    return manager.hook


PLAN = {
    "phases": '["calibrate", "fit", "more"]',
    "phase__calibrate__samples": "1280",  # 10 steps
    "phase__fit__gate": '{ use = "feasible", patience = 1, earliest = 0.0, latest = 0.25 }',
    "phase__more": '{ use = "constrained", constraints = ["faithfulness"], gate = "exhausted" }',
    "budget__tokens": "7680",  # 60 steps
    "record__save_every": "25",
    "record__keep": "2",
}


def a_plan(**sets: str) -> Plan:
    return toy_plan(**{**PLAN, **sets})


def begin(directory: Path, *observers: object, plan: Plan | None = None) -> Run:
    return Run.start(plan or a_plan(), directory, device=CPU, hooks=caller(*observers), recipe_text="")


def go_on(directory: Path, *observers: object, plan: Plan | None = None) -> Run:
    at = checkpoint.find(directory)
    return Run.resume(plan or a_plan(), at, device=CPU, hooks=caller(*observers), recipe_text="")


# ------------------------------------------------------------------------------------------------------------- phases
def test_phases_in_order_each_entered_once(tmp_path: Path) -> None:
    notes = Notes()
    run = begin(tmp_path, notes)
    assert (run.outcome, run.train()) == ("running", "done")
    assert run.outcome == "done"
    assert notes.entered == ["calibrate", "fit", "more"]
    assert notes.steps == (
        [("calibrate", 0, n) for n in range(1, 11)]
        + [("fit", n, n) for n in range(1, 21)]  # open at 15, asked every 10
        + [("more", n, n - 20) for n in range(21, 61)]
    )
    assert notes.saved == ["spalf_calibrate_step0", "spalf_fit_step20", "spalf_more_step45", "spalf_more_step60"]
    assert (run.state.clock.step, run.state.clock.entered, run.state.clock.phase) == (60, 20, "more")


def test_enter_is_not_repeated_on_resume(tmp_path: Path) -> None:
    first, second = Notes(), Notes()
    assert begin(tmp_path, first).train(stop_at=12) == "stopped"
    run = go_on(tmp_path, second)
    budgets = {k: v for k, v in run.state.measured.items() if k.endswith("budget")}
    assert budgets
    assert run.train() == "done"
    assert first.entered == ["calibrate", "fit"]
    assert second.entered == ["more"]
    assert second.steps[0] == ("fit", 13, 13)
    assert {k: run.state.measured[k] for k in budgets} == budgets


@pytest.mark.parametrize("stop_at", [0, 1, 20, 21, 60])
def test_stop_at_is_exact(tmp_path: Path, stop_at: int) -> None:
    run = begin(tmp_path)
    outcome = run.train(stop_at=stop_at)
    assert run.state.clock.step == stop_at
    assert outcome == run.outcome == ("done" if stop_at == 60 else "stopped")
    # step 20 belongs to the phase that it ends, step 0 to the calibration that has not begun
    assert run.state.clock.phase == {0: "calibrate", 1: "fit"}.get(stop_at, "more")


def test_asking_to_stop_ends_after_the_step(tmp_path: Path) -> None:
    class Stop:
        @hookimpl
        def spalf_stepped(self, run: Any, reading: Any) -> None:
            if reading.step == 7:
                run.stop()

    notes = Notes()
    run = begin(tmp_path, notes, Stop())
    assert run.train() == "stopped"
    assert notes.steps[-1] == ("fit", 7, 7)
    assert notes.saved[-1] == "spalf_fit_step7"
    assert moved(snapshot(run.state), snapshot(go_on(tmp_path).state)) == []


def test_a_phase_that_finds_the_budget_spent_is_entered_and_saved(tmp_path: Path) -> None:
    notes = Notes()
    plan = a_plan()
    fit = evolve(plan.recipe.phase["fit"], gate=plan.recipe.phase["more"].gate)
    plan = evolve(plan, recipe=evolve(plan.recipe, phase={**plan.recipe.phase, "fit": fit}))
    assert begin(tmp_path, notes, plan=plan).train() == "done"
    assert notes.entered == ["calibrate", "fit", "more"]
    assert notes.saved[-1] == "spalf_more_step60"
    assert go_on(tmp_path, plan=plan).train() == "done"


def test_a_gate_is_asked_every_ten_steps(tmp_path: Path) -> None:
    """Asking waits for the device, so between tens only the clock is looked at."""
    plan = a_plan()
    asked: list[int] = []

    class Counting(type(plan.recipe.phase["fit"])):  # type: ignore[misc]
        def done(self, plan: Any, state: Any) -> bool:
            asked.append(state.clock.step)
            return bool(super().done(plan, state))

    fit = plan.recipe.phase["fit"]
    options = {name: getattr(fit, name) for name in ("terms", "constraints", "gate")}
    plan = evolve(plan, recipe=evolve(plan.recipe, phase={**plan.recipe.phase, "fit": Counting(**options)}))
    begin(tmp_path, plan=plan).train()
    assert asked == [0, 10, 20]


# ---------------------------------------------------------------------------------------------------------- resuming
def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    begin(tmp_path).train(stop_at=12)
    run = go_on(tmp_path)
    assert run.readings == 12
    assert checkpoint.metadata(checkpoint.find(tmp_path))["serial"] == 2
    run.save()
    assert checkpoint.metadata(checkpoint.find(tmp_path))["serial"] == 3


def test_an_overridden_budget_moves_the_end_alone(tmp_path: Path) -> None:
    begin(tmp_path).train(stop_at=12)
    same, longer = go_on(tmp_path), go_on(tmp_path, plan=a_plan(budget__tokens="10_240"))
    assert moved(snapshot(same.state), snapshot(longer.state)) == ["clock.total"]
    assert longer.state.clock.total == 80
    with pytest.raises(RecipeError, match=r"budget: asks for 11 steps in all, but 12 are done \(raise budget.tokens\)"):
        go_on(tmp_path, plan=a_plan(budget__tokens="1408"))


def test_a_checkpoint_outside_a_run_cannot_go_on(tmp_path: Path) -> None:
    begin(tmp_path / "run").train(stop_at=12)
    lone = tmp_path / "lone"
    checkpoint.find(tmp_path / "run").rename(lone)
    with pytest.raises(CheckpointError, match="lies in no run directory"):
        go_on(lone)


def test_a_relative_checkpoint_knows_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path).train(stop_at=12)
    monkeypatch.chdir(tmp_path / "checkpoints")
    run = Run.resume(a_plan(), Path("spalf_fit_step12"), device=CPU, hooks=caller(), recipe_text="")
    assert run.directory == tmp_path


# ---------------------------------------------------------------------------------------------------------- diverging
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("W_dec_FD", r"step 6 of phase fit: not finite: loss, .*g of faithfulness"),
        ("lam", r"step 6 of phase fit: not finite: loss, .*lam of faithfulness"),
        ("b_enc_F", r"step 10 of phase fit: not finite: parameter b_enc_F; "),  # where a line is logged
    ],
)
def test_a_number_that_ends_is_named(tmp_path: Path, where: str, said: str) -> None:
    class Poison:
        @hookimpl
        def spalf_stepped(self, run: Any, reading: Any) -> None:
            if reading.step != 5:
                return
            if where == "lam":
                dual = run.state.control.dual
                run.state.control = evolve(run.state.control, dual=evolve(dual, lam_M=dual.lam_M + float("inf")))
            else:
                getattr(run.state.sae, where).data[:] = float("nan")

    run = begin(tmp_path, Poison())
    with pytest.raises(DivergedError, match=said) as caught:
        run.train()
    assert run.outcome == "diverged"
    assert f"the last good checkpoint is {tmp_path}/checkpoints/spalf_calibrate_step0" in str(caught.value)
    assert "(lower knobs.lr, or look at the multipliers in metrics.jsonl)" in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- time
def test_seconds_are_counted_once(tmp_path: Path) -> None:
    run = begin(tmp_path)
    run.train()
    assert set(run.wall) == {"build", "calibrate", "fit", "more", "harvest", "save"}
    assert all(v >= 0 for v in run.wall.values())
    again = go_on(tmp_path)
    assert again.wall["fit"] == pytest.approx(run.wall["fit"], abs=1e-3)


def test_a_timed_stream_is_the_stream() -> None:
    wall: dict[str, float] = {}
    plain, timed = ToyStream(), TimedStream(ToyStream(), wall)
    assert torch.equal(plain.next(32).x_BD, timed.next(32).x_BD)
    assert wall["harvest"] > 0
    assert timed.facts is plain.facts
    assert torch.equal(plain.unembedding(), timed.unembedding())
    assert flatten(timed) == flatten(plain) == {"cursor": 1, "contexts": 0}
    timed.load_state_dict({"cursor": 0, "contexts": 0})
    assert timed.state_dict()["cursor"] == 0
    with pytest.raises(AttributeError):
        _ = timed.no_such_thing
