"""`spalf bench harvest`: what it times, that whole blocks are used, and how another library's runner is asked."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from spalf.bench import harvest, harvest_models, harvest_peers, harvest_worker
from spalf.cli import app
from spalf.cli.bench_harvest import summary
from spalf.errors import RecipeError
from spalf.testing.tiny_model import write_model, write_text

CPU = torch.device("cpu")
RECIPE = Path(__file__).parents[1] / "e2e" / "survival.toml"
SMALL = ("phase.calibrate.samples=256", "source.shuffle=256", "budget.batch=64", "source.sequences=8")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("language")
    model, text = write_model(folder / "model"), write_text(folder / "text.jsonl")
    return [f'source.model="{model}"', f'source.text="{text}"', *SMALL]


@pytest.fixture(scope="module")
def report(sets: list[str]) -> harvest.Report:
    return harvest.report(str(RECIPE), sets, device="cpu", steps=1)


def test_three_timings_of_whole_blocks(report: harvest.Report) -> None:
    assert [t.kind for t in report.timings] == ["harvest", "steps", "both"]
    block = report.plan.facts.shuffle
    assert block == 255, "17 contexts of 15 rows"
    assert {t.rows for t in report.timings} == {256}
    assert all(0 < t.host_seconds <= t.seconds for t in report.timings)
    assert report.ratio == report.rate("both") / min(report.rate("harvest"), report.rate("steps"))
    assert report.state.clock.phase == "fit"
    assert report.state.clock.step == 2 * (harvest.WARMUP + 4), "steps alone, and both"
    assert report.plan.knobs.lr == 1e-6
    out = report.table()
    assert json.loads(json.dumps(out))["rows"][0]["tokens_per_s"] == pytest.approx(report.rate("harvest") * 16 / 15)


@given(steps=st.integers(1, 500), batch=st.integers(1, 300), block=st.integers(1, 3000))
def test_steps_are_rounded_up_to_whole_blocks(steps: int, batch: int, block: int) -> None:
    count = harvest.whole_blocks(steps, batch, block)
    assert count >= steps
    whole = round(count * batch / block)
    assert whole >= 1 or batch > block
    assert -batch < whole * block - count * batch < batch or batch > block


def test_steps_alone_are_timed_behind_as_many(sets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harvest, "WARMUP", 1)
    calls: list[tuple[str, int]] = []
    timed = harvest.timed

    def told(kind: str, act: Any, steps: int, batch: int, device: torch.device, warmup: int = 1) -> harvest.Timing:
        calls.append((kind, warmup))
        return timed(kind, act, steps, batch, device, warmup)

    monkeypatch.setattr(harvest, "timed", told)
    assert harvest.report(str(RECIPE), sets, device="cpu", steps=1).state.clock.step == 2 * 4 + 1 + 4
    assert calls == [("harvest", 1), ("steps", 4), ("both", 1)]


def test_resident_batches_come_round_and_the_rest_is_the_streams(sets: list[str]) -> None:
    stream = harvest.planned(str(RECIPE), sets).recipe.source.open(0, CPU)
    resident = harvest.Resident(stream, 8)
    cursor = stream.state_dict()
    seen = [resident.next(8).x_BD for _ in range(2 * harvest.RESIDENT)]
    assert all(torch.equal(a, b) for a, b in zip(seen[: harvest.RESIDENT], seen[harvest.RESIDENT :], strict=True))
    assert not torch.equal(seen[0], seen[1])
    assert resident.state_dict() == cursor, "a batch has been harvested"
    assert resident.next(5).x_BD.shape[0] == 5
    assert resident.facts is stream.facts


def test_a_recipe_without_a_language_model_has_nothing_to_harvest(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="harvests from no language model"):
        harvest.planned(str(recipe), ())
    with pytest.raises(RecipeError, match=r'no phase "nowhere"'):
        harvest.entered(harvest.planned("recipes/quickstart.toml", ()), CPU, "nowhere")


def test_a_random_model_is_one_that_the_source_opens(
    tmp_path: Path, sets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = harvest_models.Shape(d_model=32, layers=2, heads=2, hook=0, n_vocab=300, context=64)
    monkeypatch.setattr(harvest_models, "SHAPES", {"tiny": tiny})
    before = torch.random.get_rng_state()
    made = harvest_models.write("tiny", tmp_path, CPU, tokens=40_000)
    assert torch.equal(before, torch.random.get_rng_state())
    plan = harvest.planned(str(RECIPE), (*made, *SMALL))
    assert (plan.facts.d_model, plan.facts.n_vocab, plan.facts.hook) == (32, 300, "blocks.0.hook_resid_post")
    stream = plan.recipe.source.open(0, CPU)
    assert stream.next(100).x_BD.std() > 0
    assert len(stream.sequences(40).tokens_ST.unique()) > 200
    with pytest.raises(RecipeError, match=r'"huge" is no known shape \(take one of tiny\)'):
        harvest_models.write("huge", tmp_path, CPU)


# ----------------------------------------------------------------------------------------------------------- the peer
ANSWERS = """
import json, sys
order = json.load(open(sys.argv[1]))
assert sys.flags.safe_path
rows = [
    {"variant": v, "seconds": 2.0 - i, "rows": order["steps"] * order["batch"], "peak_bytes": 0}
    for i, v in enumerate(order["variants"][:2])
]
rows.append({"variant": "broken", "failed": "ValueError: no"})
json.dump({"version": "1.2.3", "rows": rows, "order": order}, open(sys.argv[2], "w"))
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(ANSWERS)
    monkeypatch.setattr(harvest_peers, "WORKER", path)
    return path


def test_the_other_library_is_asked_for_the_same_work(report: harvest.Report, worker: Path) -> None:
    found = harvest_peers.measure(report, Path(sys.executable), 4)
    order = harvest_worker.Order(**found["order"])
    assert (order.layer, order.d_model, order.width, order.batch, order.context) == (0, 16, 128, 64, 16)
    assert (order.sequences, order.steps, order.autocast) == (8, 4, False)
    assert (Path(order.model) / "config.json").is_file()
    first, second, broken = found["rows"]
    assert (first["activations_per_s"], second["activations_per_s"]) == (128.0, 256.0)
    assert second["ours_to_theirs"] == pytest.approx(report.rate("both") / 256.0)
    assert "ours_to_theirs" not in broken


def test_an_interpreter_that_fails_is_told_and_one_that_is_not_there_refused(
    report: harvest.Report, worker: Path
) -> None:
    worker.write_text("raise RuntimeError('no such library')")
    found = harvest_peers.measure(report, Path(sys.executable), 1)
    assert found == {"version": "", "rows": [], "failed": "RuntimeError: no such library"}
    with pytest.raises(RecipeError, match="does not exist"):
        harvest_peers.measure(report, Path("nowhere/python"), 1)


def test_the_worker_reads_the_clock_at_the_ends_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(harvest_worker.time, "perf_counter", lambda: next(now))
    order: Any = SimpleNamespace(warmup=2, steps=3, device="cpu")
    watch = harvest_worker.Watch(order)
    for _ in range(5):
        watch.tick()
    assert (watch.begin, watch.seconds) == (1, 1)


# ------------------------------------------------------------------------------------------------------- the terminal
def test_the_command_writes_a_table_or_json(sets: list[str], worker: Path) -> None:
    words = [word for one in sets for word in ("--set", one)]
    call = ["bench", "harvest", str(RECIPE), *words, "--device", "cpu", "--steps", "1"]
    done = CliRunner().invoke(app, [*call, "--peers", sys.executable])
    assert done.exit_code == 0, done.output
    for text in ("harvest alone", "end to end", "SAELens 1.2.3", "ValueError: no", "of the slower half", "x SAELens'"):
        assert text in " ".join(done.stdout.split())
    done = CliRunner().invoke(app, [*call, "--json"])
    out = json.loads(done.stdout)
    assert (out["F"], out["batch"], out["overlap"], len(out["rows"])) == (128, 64, True, 3)
    done = CliRunner().invoke(app, ["bench", "harvest", str(RECIPE), "--random-model", "huge", "--device", "cpu"])
    assert (done.exit_code, "no known shape" in done.stderr) == (2, True)


def test_the_summary_compares_with_the_fastest_variant() -> None:
    out = {"both_to_slower_half": 0.9, "saelens": {"rows": [{"ours_to_theirs": 7.0}, {"ours_to_theirs": 5.5}, {}]}}
    assert summary(out) == "end to end runs at 90% of the slower half; and at 5.5 x SAELens' fastest runner"
