"""Measuring runs: suites that nobody declared, what is kept, and runs side by side on the same documents."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from spalf import evaluation, launch
from spalf.engine import checkpoint, evaluate
from spalf.errors import CheckpointError, RecipeError
from spalf.evaluation import Compared, Comparison, compare, kept
from spalf.evaluation import evaluate as measure
from spalf.testing.whole import TOY

pytestmark = pytest.mark.slow  # together more than `make check` has time for

SHORT = ["budget.tokens=2560", "record.log_every=5"]


@pytest.fixture(scope="module", autouse=True)
def _few_rows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "ROWS", 1024)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one recipe by seed, and one that is allowed more features; to be looked at only."""
    out = tmp_path_factory.mktemp("runs")
    recipe = out / "toy.toml"
    recipe.write_text('extends = "spalf"\n' + TOY)
    for name, sets in (("a", ()), ("b", ("seed=2",)), ("dense", ("activation.start=4.0", "knobs.L0_target=12"))):
        launch.run(recipe, sets=[*SHORT, f"name={name}", *sets], out=out, device="cpu")
    return out


def listing(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------------------ suites
def test_what_the_recipe_declares_is_measured_as_the_run_did(runs: Path) -> None:
    before = listing(runs / "a")
    recorded = json.loads((runs / "a" / "summary.json").read_text())["evaluators"]
    assert measure(runs / "a", suites=["dictionary"], device="cpu") == recorded
    assert listing(runs / "a") == before


def test_without_a_suite_all_that_the_source_serves(runs: Path) -> None:
    """No tokens here: what needs a language model is left out, and so is what needs an option."""
    out = measure(runs / "a", sets=["evaluator.ground_truth.rows=2048"], device="cpu")
    assert set(out) == {"dictionary", "drift_fidelity", "geometry", "ground_truth", "sparsity_frontier"}


def test_a_suite_that_nobody_declared(runs: Path) -> None:
    out = measure(runs / "a", suites=["geometry"], device="cpu")
    assert list(out) == ["geometry"]
    assert 0 < out["geometry"]["coherence"] <= 1.0001


def test_a_table_of_any_name_and_its_options(runs: Path) -> None:
    sets = ['evaluator.truth={ use = "ground_truth", rows = 2048 }']
    out = measure(runs / "a", suites=["truth"], sets=sets, device="cpu")
    assert 0.3 < out["truth"]["mcc"] <= 1.0
    assert "ground_truth" not in measure(runs / "a", sets=sets, device="cpu"), "it has been measured by another name"


def test_a_suite_that_is_not_there(runs: Path) -> None:
    with pytest.raises(RecipeError, match=r'--suite geometri: is no evaluator \(did you mean "geometry"\?\)'):
        measure(runs / "a", suites=["geometri"], device="cpu")


def test_a_suite_that_the_source_cannot_serve(runs: Path) -> None:
    with pytest.raises(RecipeError, match="needs logits"):
        measure(runs / "a", suites=["downstream_loss"], device="cpu")


def test_a_required_option_is_asked_for(runs: Path) -> None:
    with pytest.raises(RecipeError, match=r"evaluator.consistency"):
        measure(runs / "a", suites=["consistency"], device="cpu")
    other = json.dumps([str(runs / "b")])
    out = measure(runs / "a", suites=["consistency"], sets=[f"evaluator.consistency.runs={other}"], device="cpu")
    assert out["consistency"]["pw_mcc"] > out["consistency"]["pw_mcc_floor"]


# -------------------------------------------------------------------------------------------------------------- kept
def test_numbers_are_kept_by_suite_until_the_checkpoint_is_another(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "a", tmp_path / "a")
    first = measure(run, suites=["geometry"], device="cpu", keep=True)
    second = measure(run, suites=["dictionary"], device="cpu", keep=True)
    at = checkpoint.find(run)
    assert kept(at) == {**first, **second}
    file = run / "evaluation.json"
    held = json.loads(file.read_text())
    held["checkpoint"] = "spalf_fit_step1"
    file.write_text(json.dumps(held))
    assert kept(at) == {}
    assert measure(run, suites=["dictionary"], device="cpu", keep=True) == kept(at)
    file.write_text("{")
    assert kept(at) == {}, "a damaged file is measured again"


def test_a_run_that_cannot_be_written_to_is_measured_all_the_same(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, value: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(evaluation, "write_json", refuse)
    run = shutil.copytree(runs / "a", tmp_path / "a")
    assert list(measure(run, suites=["geometry"], device="cpu", keep=True)) == ["geometry"]


def test_a_checkpoint_outside_of_a_run_leaves_nothing(runs: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(checkpoint.find(runs / "a"), tmp_path / "alone")
    measure(alone, suites=["geometry"], device="cpu", keep=True)
    assert list(tmp_path.iterdir()) == [alone]


# ------------------------------------------------------------------------------------------------------ side by side
def row(compared: Comparison, measure: str) -> Compared:
    return next(r for r in compared.rows if r.measure == measure)


def test_a_run_does_not_differ_from_itself(runs: Path) -> None:
    compared = compare([runs / "a", runs / "a"], device="cpu")
    assert compared.names == (str(runs / "a"), str(runs / "a")), "whole paths where two names are alike"
    with_interval = [r for r in compared.rows if r.differences[1] is not None]
    assert len(with_interval) >= 4
    for one in with_interval:
        found = one.differences[1]
        assert found is not None
        assert (found.value, found.paired, found.exceeds_noise) == (0.0, True, False), one.measure
    [agreement] = compared.agreements
    assert agreement.pw_mcc == pytest.approx(1.0, abs=1e-5)
    assert agreement.floor < 0.9


def test_what_differs_is_marked_and_measured_on_the_same_rows(runs: Path) -> None:
    compared = compare([runs / "a", runs / "dense", runs / "b"], device="cpu")
    assert compared.names == ("a", "dense", "b")
    l0 = row(compared, "l0")
    assert l0.differences[0] is None
    denser = l0.differences[1]
    assert denser is not None
    assert denser.paired, "one seed opens all sources"
    assert denser.exceeds_noise
    assert denser.low < l0.values[1] - l0.values[0] < denser.high  # type: ignore[operator]
    assert l0.values[0] == measure(runs / "a", suites=["dictionary"], device="cpu")["dictionary"]["l0"]
    assert row(compared, "dead_fraction").differences == (None, None, None), "its noise is unknown"
    assert [(a.first, a.second) for a in compared.agreements] == [(0, 1), (0, 2), (1, 2)]


def test_other_documents_are_resampled_apart(runs: Path, tmp_path: Path) -> None:
    """Another place of another model: nothing is shared, and no feature can be the same."""
    recipe = tmp_path / "wide.toml"
    recipe.write_text('extends = "spalf"\n' + TOY)
    launch.run(recipe, sets=[*SHORT, "name=wide", "source.d_model=24"], out=tmp_path, device="cpu")
    compared = compare([runs / "a", tmp_path / "wide"], suites=["dictionary", "geometry"], device="cpu")
    assert {r.suite for r in compared.rows} == {"dictionary", "geometry"}
    assert compared.agreements == ()


def test_runs_that_cannot_be_read_are_named(runs: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(runs / "b", tmp_path / "broken")
    (checkpoint.find(broken) / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"broken.*model\.safetensors: cannot be read"):
        compare([runs / "a", broken], device="cpu")
    with pytest.raises(RecipeError, match="one run has nothing to be compared with"):
        compare([runs / "a"])
