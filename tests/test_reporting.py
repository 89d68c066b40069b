"""From a run directory to a page and to features: what is read, what is kept, and what is refused."""

from __future__ import annotations

import base64
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest

import spalf
from spalf import launch, report, reporting
from spalf.errors import CheckpointError, RecipeError, SpalfError
from spalf.testing.whole import LANGUAGE

SHORT = ["budget.tokens=2560", "record.log_every=5", "evaluator.feature_absorption=false"]
FEW = {"tokens": 512, "device": "cpu"}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_rows")]  # a run is trained first


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the embedded model, to be looked at only."""
    sets = [*SHORT, *(f"{key.replace('__', '.')}={value}" for key, value in LANGUAGE.items())]
    return launch.run(recipe, sets=sets, out=tmp_path_factory.mktemp("runs"), device="cpu").directory


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "toy"))


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir(), key=lambda p: json.loads((p / "metadata.json").read_text())["serial"])


def inside(page: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The page's data and its atlas."""
    text = page.read_text(encoding="utf-8")
    blocks = dict(re.findall(r'<script type="[^"]*" id="(\w+)">(.*?)</script>', text, re.DOTALL))
    atlas = blocks["atlas"] and json.loads(zlib.decompress(base64.b64decode(blocks["atlas"])))
    return json.loads(blocks["data"]), atlas or None


def test_a_report_of_a_run(run: Path) -> None:
    path = spalf.write_report(run, **FEW)
    assert path == run / "report.html"
    data, atlas = inside(path)
    assert data["run"]["summary"]["outcome"] == "done"
    assert data["story"]["steps"] == [5, 10, 15, 20]
    assert data["recipe"] == (run / "recipe.toml").read_text()
    settled = {row["path"]: row["value"] for row in data["parameters"]}
    assert all(settled[f"constraint.{name}.budget"] > 0 for name in ("faithfulness", "drift", "orthogonality"))
    assert [one["name"] for one in data["evaluation"]] == ["dictionary"]
    spalf.evaluate(run, suites=["drift_fidelity"], device="cpu", keep=True)
    data, atlas = inside(spalf.write_report(run, **FEW))
    assert [one["name"] for one in data["evaluation"]] == ["dictionary", "drift_fidelity"]
    assert atlas is not None
    assert len(atlas["id"]) == 256
    assert len(atlas["sequences"]) == 16


def test_an_atlas_is_looked_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = spalf.features(run, **FEW)
    assert first.rows == 16 * 31
    looked: list[Any] = []
    load = launch.load
    monkeypatch.setattr(launch, "load", lambda *a, **o: looked.append(a) or load(*a, **o))
    assert spalf.features(run, **FEW) == first
    assert looked == [], "read from where it was kept"
    assert spalf.features(newest(run), **FEW) == first
    assert looked == []
    assert len(spalf.features(run, **FEW, features=8).features) == 8
    assert len(looked) == 1, "other features are looked at anew"
    (run / "atlas.json").write_text('{"made": ')
    assert spalf.features(run, **FEW) == first
    assert len(looked) == 2, "and so is what was damaged"
    metadata = newest(run) / "metadata.json"
    metadata.write_text(metadata.read_text() + "\n")
    assert spalf.features(run, **FEW) == first
    assert len(looked) == 3, "and another checkpoint"


def test_a_checkpoint_alone_has_features_and_nowhere_to_keep_them(run: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(newest(run), tmp_path / "alone"))
    before = sorted(tmp_path.rglob("*"))
    assert len(spalf.features(alone, **FEW).features) == 256
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(CheckpointError, match="alone: lies in no run directory"):
        spalf.write_report(alone, **FEW)


def test_without_features_no_model_is_opened(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "load", lambda *_, **__: pytest.fail("opened"))
    data, atlas = inside(spalf.write_report(run, run / "deeper" / "page.html", features=0))
    assert atlas is None
    assert data["run"]["F"] == 256
    assert not (run / "report.html").exists()


def test_a_stopped_run_and_one_without_text(recipe: Path, tmp_path: Path) -> None:
    stopped = launch.run(recipe, sets=SHORT, out=tmp_path, device="cpu", stop_at=10).directory
    data, atlas = inside(spalf.write_report(stopped, **FEW))
    assert data["run"]["summary"]["outcome"] == "stopped"
    assert data["evaluation"] == []
    assert atlas is not None
    assert atlas["sequences"] == []
    assert all(planted for planted in atlas["planted"])
    (stopped / "summary.json").unlink()
    (stopped / "metrics.jsonl").unlink()
    data, _ = inside(spalf.write_report(stopped, features=0))
    assert data["story"]["steps"] == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: shutil.rmtree(run), "toy: no such directory"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "toy: holds no whole checkpoint"),
        (lambda run: (run / "metrics.jsonl").write_text("{]\n"), "metrics.jsonl, line 1: is no JSON"),
        (lambda run: (run / "summary.json").write_text("{]"), "summary.json: is no JSON"),
        (lambda run: (newest(run) / "model.safetensors").write_bytes(b"x"), "model.safetensors: cannot be read"),
        (lambda run: (newest(run) / "recipe.toml").write_text("seed = [\n"), "recipe.toml"),
        (lambda run: (run / "report.html").mkdir(), "report.html is a directory"),
    ],
    ids=["gone", "empty", "metrics", "summary", "tensors", "recipe", "target"],
)
def test_one_message_and_nothing_half_written(run: Path, damage: Any, said: str) -> None:
    damage(run)
    with pytest.raises(SpalfError, match=said) as caught:
        spalf.write_report(run, **FEW)
    assert caught.value.exit_code == 2
    assert not (run / "report.html").is_file()
    assert not list(run.glob(".report*"))


@pytest.mark.parametrize("options", [{"features": 0}, {"tokens": 0}, {"features": -3}])
def test_nothing_to_look_at(run: Path, options: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="give at least one"):
        spalf.features(run, **options)


def test_a_new_run_sweeps_the_old_page_away() -> None:
    assert {"report.html", reporting.KEPT} <= set(launch.WRITTEN)
    assert report.FORMAT == 1
