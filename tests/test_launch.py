"""What the command line does, as functions: nothing is written before all is well, and nothing else is ever deleted."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spalf import hookimpl, launch, training
from spalf.engine import checkpoint
from spalf.errors import CheckpointError, DeadConstraintError, DivergedError, RecipeError, RunError, SourceError
from spalf.testing.whole import moved, snapshot

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_rows")]  # together more than `make check` has time for

# 20 steps.
SHORT = ["budget.tokens=2560", "record.log_every=5"]
WRITTEN = ["checkpoints", "features.json", "metrics.jsonl", "plan.json", "recipe.toml", "summary.json"]


def run(recipe: Path, out: Path, *sets: str, **options: Any) -> launch.Result:
    return launch.run(recipe, sets=[*SHORT, *sets], out=out, device="cpu", **options)


@pytest.fixture(scope="module")
def done(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run, to be looked at only."""
    return run(recipe, tmp_path_factory.mktemp("done")).directory


def listing(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------------------ a run
def test_a_run_leaves_its_record(recipe: Path, tmp_path: Path) -> None:
    result = run(recipe, tmp_path)
    assert result.directory == tmp_path / "toy"
    assert result.outcome == "done"
    assert sorted(p.name for p in result.directory.iterdir()) == WRITTEN
    summary = json.loads((result.directory / "summary.json").read_text())
    assert summary["outcome"] == "done"
    assert summary["l0"] == result.summary["l0"]
    assert "evaluate" in summary["wall_seconds"]
    assert json.loads((result.directory / "features.json").read_text()) == result.examples == []
    assert (result.directory / "recipe.toml").read_text() == launch.filled_text(recipe, SHORT)
    plan = json.loads((result.directory / "plan.json").read_text())
    assert plan["total_steps"] == 20


def test_the_recorded_recipe_is_the_recipe(recipe: Path, done: Path) -> None:
    ours, theirs = launch.compile_recipe(recipe, SHORT), launch.compile_recipe(done / "recipe.toml")
    assert ours == theirs


def test_an_existing_run_is_refused(recipe: Path, tmp_path: Path) -> None:
    run(recipe, tmp_path)
    before = listing(tmp_path)
    with pytest.raises(RecipeError, match=r"toy: exists already \(resume it, give another --out or name, or --force"):
        run(recipe, tmp_path)
    assert listing(tmp_path) == before


def test_an_empty_directory_is_no_run(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    assert run(recipe, tmp_path).outcome == "done"


def test_a_file_in_the_way_is_named(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "toy").write_text("mine")
    for force in (False, True):
        with pytest.raises(RecipeError, match=r"toy: is a file \(give another --out or name\)"):
            run(recipe, tmp_path, force=force)
    assert (tmp_path / "toy").read_text() == "mine"


def test_force_replaces_the_run_and_nothing_else(recipe: Path, tmp_path: Path) -> None:
    directory = run(recipe, tmp_path).directory
    (directory / "notes.md").write_text("what I saw")
    (directory / "plots").mkdir()
    (directory / "plots" / "l0.txt").write_text("a plot")
    (directory / "report.html").write_text("old")
    (directory / "checkpoints" / "stale").mkdir()
    again = run(recipe, tmp_path, "seed=5", force=True)
    assert again.summary["seed"] == 5
    assert (directory / "notes.md").read_text() == "what I saw"
    assert (directory / "plots" / "l0.txt").read_text() == "a plot"
    assert sorted(p.name for p in directory.iterdir()) == sorted([*WRITTEN, "notes.md", "plots"])
    assert not (directory / "checkpoints" / "stale").exists()
    assert all(checkpoint.metadata(p)["serial"] <= 2 for p in checkpoint.all_in(directory / "checkpoints"))


@pytest.mark.parametrize(
    ("sets", "error", "said"),
    [
        (["knobs.R2_target=1.5"], RecipeError, "knobs.R2_target"),
        (["dual.kpp=1"], RecipeError, "dual.kpp: unknown option"),
        (["source.features=4", "source.trees=8"], RecipeError, "source.trees = 8"),
    ],
)
def test_a_wrong_recipe_writes_nothing(
    recipe: Path, tmp_path: Path, sets: list[str], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        run(recipe, tmp_path, *sets)
    assert list(tmp_path.iterdir()) == []
    run(recipe, tmp_path)
    before = listing(tmp_path)
    with pytest.raises(error, match=said):
        run(recipe, tmp_path, *sets, force=True)
    assert listing(tmp_path) == before, "force deletes nothing before the new run stands"


def test_a_source_that_cannot_be_opened_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    source = 'source={ use = "huggingface", model = "embedded", text = "/no/such/text", layer = 1 }'
    with pytest.raises(SourceError, match="/no/such/text"):
        run(recipe, tmp_path, source)
    assert list(tmp_path.iterdir()) == []
    run(recipe, tmp_path)
    before = listing(tmp_path)
    with pytest.raises(SourceError):
        run(recipe, tmp_path, source, force=True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("gpu", "'gpu' is not a device"),
        ("mps", "'mps' is not a device"),
        ("meta", "'meta' is not a device"),
        ("cpu:0", "'cpu:0' is not a device"),
        ("cuda:-1", "'cuda:-1' is not a device"),
        ("cuda:0", "'cuda:0' is not available here"),
        ("cuda", "not available"),
    ],
)
def test_a_device_that_is_not_there(
    recipe: Path, tmp_path: Path, device: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=f"--device: .*{said}"):
        launch.run(recipe, out=tmp_path, device=device)
    assert list(tmp_path.iterdir()) == []
    assert launch.device_of("auto") == torch.device("cpu")


def test_a_device_s_number_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch.device_of("cuda:1") == torch.device("cuda:1")
    with pytest.raises(RecipeError, match=r"--device: 'cuda:2' is not available here \(there are 2 CUDA devices\)"):
        launch.device_of("cuda:2")


# ------------------------------------------------------------------------------------------------------------- endings
class At:
    """Calls `act` with the run at a training step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    @hookimpl
    def spalf_stepped(self, run: Any, reading: Any) -> None:
        if reading.step == self.step:
            self.act(run)


def test_stop_at(recipe: Path, tmp_path: Path) -> None:
    result = run(recipe, tmp_path, stop_at=7)
    assert (result.outcome, result.examples) == ("stopped", [])
    assert result.summary == {"name": "toy", "outcome": "stopped", "step": 7, "phase": "fit"}
    assert json.loads((result.directory / "summary.json").read_text()) == result.summary
    assert launch.resume(result.directory, device="cpu").outcome == "done"
    assert json.loads((result.directory / "summary.json").read_text())["outcome"] == "done"


def test_a_diverged_run_says_so_in_its_summary(recipe: Path, tmp_path: Path) -> None:
    def poison(run: Any) -> None:
        run.state.sae.W_dec_FD.data[0] = float("inf")

    with pytest.raises(DivergedError) as caught:
        run(recipe, tmp_path, observers=[At(5, poison)])
    summary = json.loads((tmp_path / "toy" / "summary.json").read_text())
    notes = [str(caught.value)]
    assert summary == {"name": "toy", "outcome": "diverged", "notes": notes, "step": 6, "phase": "fit"}


def test_a_dead_constraint_stops_the_run(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spalf.parts.term import L0

    value = L0.value
    monkeypatch.setattr(L0, "value", lambda self, view: value(self, view).detach())
    with pytest.raises(DeadConstraintError, match='term "l0": the value depends on no parameter'):
        run(recipe, tmp_path)
    assert checkpoint.find(tmp_path / "toy").name == "spalf_calibrate_step0", "calibration is not lost"
    summary = json.loads((tmp_path / "toy" / "summary.json").read_text())
    assert (summary["outcome"], summary["step"], summary["phase"]) == ("failed", 0, "fit")
    assert "the value depends on no parameter" in summary["notes"][0]


def test_running_out_of_memory_has_a_remedy(recipe: Path, tmp_path: Path) -> None:
    def full(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has more to say.")

    with pytest.raises(RunError, match=r"^out of device memory: CUDA out of memory\. \(lower budget.batch, knobs.F or"):
        run(recipe, tmp_path, observers=[At(3, full)])
    summary = json.loads((tmp_path / "toy" / "summary.json").read_text())
    assert (summary["outcome"], summary["step"]) == ("failed", 3)
    assert summary["notes"][0].startswith("out of device memory: ")


def test_a_fault_is_in_the_summary_with_its_kind(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(recipe, tmp_path, observers=[At(3, lambda _: 1 // 0)])
    summary = json.loads((tmp_path / "toy" / "summary.json").read_text())
    assert (summary["outcome"], summary["notes"][0].split(":")[0]) == ("failed", "ZeroDivisionError")


# ------------------------------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_and_a_second_one_insists(recipe: Path, tmp_path: Path, number: signal.Signals) -> None:
    heard: list[int] = []
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    mine = signal.signal(number, lambda n, _: heard.append(n))

    def twice(_: Any) -> None:
        signal.raise_signal(number)
        assert heard == []
        signal.raise_signal(number)

    try:
        result = run(recipe, tmp_path, observers=[At(4, twice)])
        assert heard == [number], "the second one went to whoever was listening before"
        assert signal.getsignal(number) not in (mine, before[number])
    finally:
        signal.signal(number, mine)
    assert (result.outcome, result.summary["step"]) == ("stopped", 4)
    assert {s: signal.getsignal(s) for s in before} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_closing_evaluation_stops_it(
    recipe: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(training, "summarize", lambda *_: signal.raise_signal(number))
        result = run(recipe, tmp_path)
    assert signal.getsignal(number) == before
    assert (result.outcome, result.summary["step"]) == ("stopped", 20)
    assert json.loads((result.directory / "summary.json").read_text()) == result.summary
    resumed = launch.resume(result.directory, device="cpu")
    assert (resumed.outcome, resumed.summary["step"]) == ("done", 20)


def test_a_signal_at_the_last_step_spares_the_evaluation(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "summarize", lambda *_: pytest.fail("a run that was asked to stop went on"))
    last = At(20, lambda _: signal.raise_signal(signal.SIGTERM))
    result = run(recipe, tmp_path, observers=[last])
    assert (result.outcome, result.summary["step"]) == ("stopped", 20)


def test_no_handlers_outside_the_main_thread(recipe: Path, tmp_path: Path) -> None:
    results: list[launch.Result] = []
    thread = threading.Thread(target=lambda: results.append(run(recipe, tmp_path)))
    thread.start()
    thread.join()
    assert results[0].outcome == "done"


# ------------------------------------------------------------------------------------------------------------ resuming
def test_a_missing_plugin_is_named_with_its_distribution(recipe: Path, tmp_path: Path) -> None:
    directory = run(recipe, tmp_path, stop_at=5).directory
    at = checkpoint.find(directory)
    meta = json.loads((at / "metadata.json").read_text())
    meta["components"] |= {"dual.magic": "acme-duals 1.2", "term.odd": "acme-terms 0.1"}
    (at / "metadata.json").write_text(json.dumps(meta))
    said = r"needs dual\.magic from acme-duals 1\.2, term\.odd from acme-terms 0\.1 \(install what is missing\)"
    for act in (launch.resume, launch.load):
        with pytest.raises(CheckpointError, match=said):
            act(directory, device="cpu")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("assignment", "allowed"),
    [
        ("record.keep=1", True),
        ("record={ keep = 1 }", True),
        ("budget.tokens=5120", True),
        (" kernel = torch", True),
        ("evaluator.ground_truth.rows=64", True),
        ("budget.batch=64", False),
        ("budget={ tokens = 5120 }", False),
        ("recorder=1", False),
        ("seed=3", False),
        ("phase.fit.terms=[]", False),
    ],
)
def test_what_may_be_overridden(assignment: str, allowed: bool) -> None:
    assert launch._allowed(assignment) is allowed


def test_a_budget_below_what_is_done_is_refused_before_the_build(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = run(recipe, tmp_path, stop_at=15).directory
    before = listing(directory)
    monkeypatch.setattr("spalf.engine.run.build", lambda *_: pytest.fail("built for nothing"))
    with pytest.raises(
        RecipeError, match=r"^budget: asks for 10 steps in all, but 15 are done \(raise budget.tokens\)$"
    ):
        launch.resume(directory, sets=["budget.tokens=1280"], device="cpu")
    assert listing(directory) == before


def test_one_bad_checkpoint_does_not_stand_in_the_way(recipe: Path, tmp_path: Path) -> None:
    directory = run(recipe, tmp_path, stop_at=10).directory
    bad = directory / "checkpoints" / "spalf_fit_step11"
    bad.mkdir()
    (bad / "metadata.json").write_bytes(b"\xff\xfe")
    assert launch.resume(directory, device="cpu").outcome == "done"
    with pytest.raises(CheckpointError, match=r"spalf_fit_step11.metadata\.json: cannot be read"):
        launch.resume(bad, device="cpu")


def test_resume_applies_what_it_allows(recipe: Path, tmp_path: Path) -> None:
    directory = run(recipe, tmp_path, stop_at=10).directory
    result = launch.resume(directory, sets=["budget.tokens=3200", "record.keep=5"], device="cpu")
    assert result.summary["step"] == 25
    text = (directory / "recipe.toml").read_text()
    assert "tokens = 3200" in text
    assert "keep = 5" in text
    assert (checkpoint.find(directory) / "recipe.toml").read_text() == text


# ----------------------------------------------------------------------------------------------- looking and measuring
def test_load_gives_the_state(done: Path) -> None:
    loaded = launch.load(done, device="cpu")
    assert loaded.plan == launch.compile_recipe(done / "recipe.toml")
    model = load_file(checkpoint.find(done) / "model.safetensors")
    assert torch.equal(loaded.state.sae.W_dec_FD, model["learner.model.W_dec_FD"])
    one = next((done / "checkpoints").glob("*fit*"))
    assert moved(snapshot(loaded.state), snapshot(launch.load(one, device="cpu").state)) == []


def test_export_reconstructs_raw_activations(done: Path, tmp_path: Path) -> None:
    from spalf.engine.step import reconstructor

    out = launch.export(done, tmp_path / "dictionary")
    loaded = launch.load(done, device="cpu")
    assert out.is_dir()
    x_BD = loaded.state.stream.held_out().next(32).x_BD
    weights = load_file(next(out.glob("*.safetensors")))
    p_BF = x_BD @ weights["W_enc"].T + weights["b_enc"]
    hat_BD = torch.where(p_BF > weights["threshold"], p_BF, 0.0) @ weights["W_dec"] + weights["b_dec"]
    assert torch.allclose(hat_BD, reconstructor(loaded.state)(x_BD).detach(), atol=1e-4)


def test_export_needs_neither_model_nor_text(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spalf.parts.source.synthetic import Synthetic

    usual = launch.export(done, tmp_path / "usual")
    for name in ("open", "facts"):
        monkeypatch.setattr(Synthetic, name, lambda *_: pytest.fail("the source was asked"))
    closed = launch.export(done, tmp_path / "closed")
    assert listing(usual) == listing(closed)


def test_harvest_writes_what_the_activations_source_reads(recipe: Path, tmp_path: Path) -> None:
    out = launch.harvest(recipe, tmp_path / "shards", tokens=1000, device="cpu")
    plan = launch.compile_recipe(recipe)
    x_BD = plan.recipe.source.open(plan.recipe.seed, torch.device("cpu")).next(1000).x_BD
    assert torch.equal(load_file(out / "training-00000.safetensors")["activations"], x_BD)
    source = f'source={{ use = "activations", path = "{out}", shuffle = 512 }}'
    without_truth = [source, "phase.calibrate.samples=512"]
    assert run(recipe, tmp_path, *without_truth).outcome == "done"


def test_harvest_writes_pairs_that_the_difference_source_reads(tmp_path: Path) -> None:
    from spalf.parts.source.difference import Difference
    from spalf.parts.source.pairs import read_pairs

    texts = tmp_path / "pairs.jsonl"
    texts.write_text("".join(f'{{"a": "x = {i}", "b": "y = {i}", "labels": {{"y": 1}}}}\n' for i in range(12)))
    source = 'source={ use = "huggingface", model = "embedded", layer = 1, text = "stdlib", dtype = "float32" }'
    sets = ["name='pairs'", source]
    out = launch.harvest("spalf", tmp_path / "pairs", sets=sets, pairs=texts, position="mean", device="cpu")
    pairs = read_pairs(out)
    assert (len(pairs), pairs.concepts, pairs.facts.hook) == (12, ("y",), "blocks.1.hook_resid_post")
    assert "labels" in Difference(pairs=str(out), held_out=0.2).facts().provides
    with pytest.raises(RecipeError, match="exists already"):
        launch.harvest("spalf", out, sets=sets, pairs=texts, device="cpu")
    with pytest.raises(RecipeError, match="--tokens: has no part in harvesting pairs"):
        launch.harvest("spalf", tmp_path / "more", sets=sets, pairs=texts, tokens=5, device="cpu")
