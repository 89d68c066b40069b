"""A run that is cut anywhere and resumed ends at the very same tensors as one that never was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spalf import hookimpl, launch
from spalf.engine import checkpoint, evaluate
from spalf.errors import CheckpointError, DivergedError, RecipeError
from spalf.testing.tiny_model import write_model, write_text

RECIPE = Path(__file__).parent / "survival.toml"
# Calibration takes 16 steps, fit 30, causal 30; a checkpoint every 15 and at the end of each.
CUTS = [("calibrate", 9), ("calibrate", 16), ("fit", 1), ("fit", 22), ("causal", 17)]
KILLS = [("calibrate", 3), ("calibrate", 16), ("fit", 22), ("causal", 17)]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model and a text that nobody has to download."""
    folder = tmp_path_factory.mktemp("language")
    model, text = write_model(folder / "model"), write_text(folder / "text.jsonl", documents=200)
    return [f'source.model="{model}"', f'source.text="{text}"']


@pytest.fixture(scope="module", autouse=True)
def _few_rows() -> Iterator[None]:
    """How many rows a finished dictionary is measured on makes no difference here but time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "ROWS", 1024)
        yield


class At:
    """Calls `act` with the run after the `nth` step of `phase`."""

    def __init__(self, phase: str, nth: int, act: Callable[[Any], None]) -> None:
        self.phase, self.nth, self.act = phase, nth, act

    @hookimpl
    def spalf_stepped(self, run: Any, reading: Any) -> None:
        if (reading.phase, run.readings) == (self.phase, self.nth):
            self.act(run)


def send(number: int) -> Callable[[Any], None]:
    """A signal to this very process."""
    return lambda run: os.kill(os.getpid(), number)


Start = Callable[..., launch.Result]


@pytest.fixture
def start(sets: list[str], tmp_path: Path) -> Start:
    """`launch.run` of the recipe below `tmp_path`."""

    def run(*observers: Any, **options: Any) -> launch.Result:
        return launch.run(RECIPE, sets=sets, out=tmp_path, device="cpu", observers=observers, **options)

    return run


def resume(run: Path, **options: Any) -> launch.Result:
    return launch.resume(run, device="cpu", **options)


def final(run: Path) -> dict[str, Any]:
    """Every leaf of the newest checkpoint: tensors by name, and the scalars, generators and cursors among them."""
    at = checkpoint.find(run)
    out: dict[str, Any] = {"scalars": checkpoint.metadata(at)["scalars"]}
    for file in sorted(at.glob("*.safetensors")):
        out.update(load_file(file))
    return out


def assert_same(uncut: Path, other: Path) -> None:
    """Every tensor bit for bit, every scalar, every line of metrics.jsonl; and no litter."""
    a, b = final(uncut), final(other)
    assert a.keys() == b.keys()
    assert a["scalars"] == b["scalars"]
    moved = [k for k in a if isinstance(a[k], torch.Tensor) and not torch.equal(a[k], b[k])]
    assert moved == []
    assert (uncut / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    assert [p.name for p in (other / "checkpoints").iterdir() if p.name.startswith(".")] == []


@pytest.fixture(scope="module")
def uncut(sets: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uncut")
    return launch.run(RECIPE, sets=sets, out=out, device="cpu").directory


def test_the_recipe_puts_everything_at_stake(uncut: Path) -> None:
    """Moments, multipliers, penalties, anchors, generators and cursors have all moved by the end."""
    flat = final(uncut)
    scalars = flat["scalars"]
    assert scalars["clock.step"] == 60
    assert scalars["clock.entered"] == 30
    assert {"rng.device", "measured.causal.budget", "measured.faithfulness.budget"} <= scalars.keys()
    assert float(flat["control.dual.lam_M"].max()) > 0
    assert float((flat["control.penalty.mean_square_M"] - 1.0).abs().max()) > 0
    assert bool(flat["control.on_M"].all())
    assert "anchors.anchored.directions_AD" in flat
    assert float(flat["learner.optimizer.W_dec_FD.exp_avg"].abs().max()) > 0
    assert scalars["stream.sequences.offset"] > 0
    lines = [json.loads(text) for text in (uncut / "metrics.jsonl").read_text().splitlines()]
    assert [(one["phase"], one["step"]) for one in lines] == (
        [("calibrate", 0)] * 3 + [("fit", n) for n in range(5, 31, 5)] + [("causal", n) for n in range(35, 61, 5)]
    )


def test_two_runs_from_one_seed_are_one_run(uncut: Path, start: Start) -> None:
    again = start()
    assert_same(uncut, again.directory)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (uncut, again.directory)]
    assert [s.pop("wall_seconds") is not None for s in summaries] == [True, True]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize(("phase", "nth"), CUTS)
def test_sigterm_loses_nothing(uncut: Path, start: Start, phase: str, nth: int) -> None:
    cut = start(At(phase, nth, send(signal.SIGTERM)))
    assert cut.outcome == "stopped"
    assert json.loads((cut.directory / "summary.json").read_text())["outcome"] == "stopped"
    at = checkpoint.metadata(checkpoint.find(cut.directory))
    # A phase that is over when the signal comes is over: the run stops at the gate of the next.
    assert (at["phase"], at["readings"]) == (("fit", 0) if (phase, nth) == ("calibrate", 16) else (phase, nth))
    assert resume(cut.directory).outcome == "done"
    assert_same(uncut, cut.directory)


def test_cut_many_times(uncut: Path, start: Start) -> None:
    run = start(At("calibrate", 5, send(signal.SIGINT))).directory
    for phase, nth in (("calibrate", 6), ("fit", 7), ("fit", 8), ("causal", 30)):
        assert resume(run, observers=[At(phase, nth, send(signal.SIGTERM))]).outcome in ("stopped", "done")
    assert resume(run).outcome == "done"
    assert_same(uncut, run)


DRIVER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import transformers.models.auto.modeling_auto, transformers.models.gpt_neox.modeling_gpt_neox
from test_survival import At, KILLS, RECIPE, launch, send, signal
for i, (phase, nth) in enumerate(KILLS):
    if os.fork() == 0:
        kill = At(phase, nth, send(signal.SIGKILL))
        launch.run(RECIPE, sets=sys.argv[3:], out=f"{sys.argv[2]}/{i}", device="cpu", observers=[kill])
        os._exit(3)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture(scope="module")
def killed(sets: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Run directories of processes that were killed, by phase and step; one interpreter forks them all."""
    out = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", DRIVER, str(RECIPE.parent), str(out), *sets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(KILLS), done.stderr
    return {case: out / str(i) / "survival" for i, case in enumerate(KILLS)}


@pytest.mark.parametrize(("phase", "nth"), KILLS)
def test_sigkill_loses_at_most_the_time_since_the_last_checkpoint(
    uncut: Path, killed: dict[tuple[str, int], Path], phase: str, nth: int
) -> None:
    run = killed[phase, nth]
    if (phase, nth) == ("calibrate", 3):
        with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
            resume(run)
        return
    assert resume(run).outcome == "done"
    assert_same(uncut, run)


class Killed(BaseException):
    """What a kill is, in a test of the same process: nothing of ours catches it."""


MOMENTS = [("save_file", 3), ("_write", 2), ("_swap", 1)]


@pytest.mark.parametrize(("function", "nth"), MOMENTS)
def test_a_kill_while_saving_leaves_the_older_checkpoint(
    uncut: Path, start: Start, function: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(stop_at=20).directory
    before, calls, real = final(run), [0], getattr(checkpoint, function)

    def die(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, function, die)
        with pytest.raises(Killed):
            resume(run)
    assert any(p.name.startswith(".") for p in (run / "checkpoints").iterdir()), "the draft of the killed save"
    assert all(torch.equal(v, before[k]) for k, v in final(run).items() if isinstance(v, torch.Tensor))
    assert resume(run).outcome == "done"
    assert_same(uncut, run)


@pytest.mark.parametrize("nth", [2, 3])
def test_a_kill_while_replacing_leaves_one_whole_checkpoint(
    uncut: Path, start: Start, sets: list[str], tmp_path: Path, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration saves twice under one name: the older directory steps aside, the newer takes its place."""
    calls, real = [0], Path.rename

    def die(self: Path, target: Any) -> Path:
        if self.name.lstrip(".").startswith("spalf_"):
            calls[0] += 1
            if calls[0] == nth:
                raise Killed
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(Killed):
            start()
    run = tmp_path / "survival"
    assert checkpoint.find(run).name == "spalf_calibrate_step0"
    assert checkpoint.metadata(checkpoint.find(run))["readings"] == 15
    assert resume(run).outcome == "done"
    assert_same(uncut, run)


# --------------------------------------------------------------------------------------------------- numbers that end
def poison(run: Any) -> None:
    """One weight becomes NaN, as a bad kernel or a bad batch would make it."""
    run.state.sae.W_dec_FD.data[3, 1] = float("nan")


def test_nan_stops_the_run_and_the_last_good_checkpoint_stays(uncut: Path, start: Start, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"step 21 of phase fit: not finite: loss, .*last good checkpoint is .*15"):
        start(At("fit", 20, poison))
    run = tmp_path / "survival"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["outcome"] == "diverged"
    assert "not finite" in summary["notes"][0]
    floats = [v for v in final(run).values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    assert all(bool(t.isfinite().all()) for t in floats)
    assert resume(run).outcome == "done"
    assert_same(uncut, run)


def test_nan_that_only_a_save_would_see_is_not_saved(start: Start, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"step 15 of phase fit: not finite: learner.model.W_dec_FD; the last good"):
        start(At("fit", 15, poison))
    run = tmp_path / "survival"
    assert json.loads((run / "summary.json").read_text())["outcome"] == "diverged"
    assert checkpoint.find(run).name == "spalf_calibrate_step0"


# ------------------------------------------------------------------------------------------------------ resuming well
def test_resume_refuses_what_would_change_the_numbers(uncut: Path) -> None:
    with pytest.raises(RecipeError, match=r"knobs.lr: cannot be changed on resume \(start a new run\)"):
        resume(uncut, sets=["knobs.lr=0.1"])
    with pytest.raises(RecipeError) as caught:
        resume(uncut, sets=["seed=3", "budget.batch=64", "record.keep=1"])
    assert [p.path for p in caught.value.problems] == ["seed", "budget.batch"]


def test_resume_refuses_a_budget_that_is_spent(uncut: Path) -> None:
    with pytest.raises(RecipeError, match="asks for 10 steps in all, but 60 are done"):
        resume(uncut, sets=["budget.tokens=1280"])


def test_resume_names_the_checkpoints_there_are(uncut: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no checkpoint 'spalf_fit_step3' \(there are: .*spalf_fit_step30"):
        resume(uncut, checkpoint="spalf_fit_step3")
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        resume(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        resume(tmp_path / "nowhere")


def test_an_older_checkpoint_goes_on_and_is_the_newest_then(start: Start) -> None:
    run = start(stop_at=40).directory
    assert checkpoint.find(run).name == "spalf_causal_step40"
    again = resume(run, checkpoint="spalf_fit_step15", stop_at=22)
    assert again.outcome == "stopped"
    assert checkpoint.find(run).name == "spalf_fit_step22"
    steps = [json.loads(text)["step"] for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 0, 0, 5, 10, 15, 20]


def test_a_longer_budget_goes_on_from_the_end(uncut: Path, start: Start) -> None:
    run = start().directory
    assert resume(run, sets=["budget.tokens=8320", "record.log_every=1"]).summary["step"] == 65
    lines = (run / "metrics.jsonl").read_text()
    assert lines.startswith((uncut / "metrics.jsonl").read_text())
    assert [json.loads(text)["step"] for text in lines.splitlines()][-6:] == [60, 61, 62, 63, 64, 65]


# ------------------------------------------------------------------------------------------------------- command line
def test_sigterm_through_the_command_line(sets: list[str], tmp_path: Path) -> None:
    options = [word for one in (*sets, "budget.tokens=12_800_000") for word in ("--set", one)]
    command = [sys.executable, "-m", "spalf", "run", str(RECIPE), "--out", str(tmp_path), "--device", "cpu", *options]
    run, metrics = tmp_path / "survival", tmp_path / "survival" / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and '"fit"' in metrics.read_text()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no step of fit within two minutes"
            time.sleep(0.05)
        process.terminate()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert f"spalf resume {run}" in " ".join(output.split())
    assert json.loads((run / "summary.json").read_text())["outcome"] == "stopped"
    step = checkpoint.metadata(checkpoint.find(run))["step"]
    assert step > 0
    assert resume(run, stop_at=step + 3).summary["step"] == step + 3
