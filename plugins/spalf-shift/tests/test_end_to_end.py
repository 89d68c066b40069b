"""The package as a stranger uses it: sentences, harvest, a run that resumes, evaluators, every recipe, the study."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from spalf_shift import study
from spalf_shift.evaluator import pairs_for
from spalf_shift.study import RECIPES

import spalf
from spalf import Pairs, SourceError, read_pairs

SHORT = ["budget.tokens=19200", "phase.calibrate.samples=2048", "record.log_every=10"]  # 75 steps


def command(*arguments: str) -> str:
    """Standard output of one command line; fails with its standard error."""
    words = [sys.executable, "-m", "spalf", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled sentences through the embedded model, by the two commands."""
    folder = tmp_path_factory.mktemp("pairs")
    texts, out = folder / "pairs.jsonl", folder / "pairs"
    command("shift", "sentences", str(texts), "--groups", "150")
    command("harvest", str(RECIPES / "embedded.toml"), str(out), "--pairs", str(texts), "--position", "mean")
    return out


@pytest.fixture(scope="module")
def held(pairs: Path) -> Pairs:
    return read_pairs(pairs)


def test_listed_with_their_origin() -> None:
    listed = json.loads(command("components", "list", "--json"))
    mine = {(c["slot"], c["name"]) for c in listed if c["origin"].split()[0] == "spalf-shift"}
    assert mine == {
        ("activation", "soft_threshold"),
        ("whitener", "shift_scale"),
        ("constraint", "code_level"),
        ("dual", "cooper"),
        ("phase", "cooper"),
        ("source", "endpoints"),
        ("evaluator", "concept_mcc"),
        ("evaluator", "concept_probe"),
        ("evaluator", "steering_accuracy"),
    }


def test_harvested_pairs_are_labelled(held: Pairs) -> None:
    assert len(held) == 600
    assert len(held.concepts) == 16
    assert held.facts.hook == "blocks.2.hook_resid_post"
    assert held.labels_NC is not None
    assert int(held.labels_NC.sum()) == 0, "every pair has its mirror image"


@pytest.fixture(scope="module")
def run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shift_l1, stopped on its ramp and resumed, so that Cooper's state has been through a checkpoint."""
    out = tmp_path_factory.mktemp("runs")
    evaluators = "concept_mcc = {}, concept_probe = { ks = [1, 5] }, steering_accuracy = {}"
    off = "downstream_loss = false, sparsity_frontier = false, drift_fidelity = false"
    sets = [f'source.pairs="{pairs}"', *SHORT, f"evaluator={{ {evaluators}, {off} }}"]
    recipe = str(RECIPES / "shift_l1.toml")
    command("run", recipe, *[w for s in sets for w in ("--set", s)], "--out", str(out), "--stop-at", "25", "--quiet")
    command("resume", str(out / "shift_l1"), "--quiet")
    return out / "shift_l1"


@pytest.mark.slow
def test_a_run_and_its_evaluators(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["outcome"], summary["step"]) == ("done", 75)
    level = summary["constraints"]["level"]
    assert level["budget"] == pytest.approx(math.sqrt(3 * 192) / 64)
    assert level["multiplier"] > 0.0
    found = summary["evaluators"]
    assert found["concept_mcc"]["c"] > found["concept_mcc"]["c_permuted"] + 0.1
    assert set(found["concept_probe"]) == {f"{name}@{k}" for name in ("accuracy", "auc", "corr") for k in (1, 5)}
    assert 0.0 <= found["steering_accuracy"]["accuracy"] <= 1.0


@pytest.mark.slow
def test_the_checkpoint_names_the_package(run: Path) -> None:
    newest = max((run / "checkpoints").iterdir(), key=lambda p: p.stat().st_mtime)
    components = json.loads((newest / "metadata.json").read_text())["components"]
    assert components["phase.cooper"].startswith("spalf-shift ")
    assert components["dual.cooper"].startswith("spalf-shift ")


@pytest.mark.slow
def test_a_signed_dictionary_is_not_exported_as_another(run: Path, tmp_path: Path) -> None:
    with pytest.raises(spalf.CheckpointError, match="both signs"):
        spalf.export(run, tmp_path / "dictionary")


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("shift_*.toml")))
def test_every_recipe_trains(name: str, pairs: Path, tmp_path: Path) -> None:
    result = spalf.run(RECIPES / f"{name}.toml", sets=[f'source.pairs="{pairs}"', *SHORT], out=tmp_path, device="cpu")
    assert result.outcome == "done"
    assert 0.0 < result.summary["r2_raw"] <= 1.0
    assert result.directory.name == name


def test_a_recipe_reads_texts_by_itself(tmp_path: Path) -> None:
    texts = tmp_path / "pairs.jsonl"
    command("shift", "sentences", str(texts), "--groups", "80")
    of = '{ use = "huggingface", model = "embedded", layer = 1, text = "stdlib", dtype = "float32" }'
    source = f'source={{ use = "difference", pairs = "{texts}", of = {of} }}'
    plan = spalf.compile_recipe(RECIPES / "shift_l1.toml", [source])
    assert plan.facts.d_model == 192


def test_pairs_of_another_width_are_refused(pairs: Path, directory: Path) -> None:
    plan = spalf.compile_recipe(RECIPES / "shift_l1.toml", [f'source.pairs="{pairs}"'])
    assert len(pairs_for("", plan)) == 600, "the source's own"
    with pytest.raises(SourceError, match="24 dimensions, this dictionary takes 192"):
        pairs_for(str(directory), plan)


@pytest.mark.slow
def test_the_study(held: Pairs) -> None:
    """One seed is enough to see that a trained row and a computed one come out whole."""
    names = ["PCA", "shift, L1", "ends, L1"]
    told: list[str] = []
    rows = list(study.study(held, 2, only=names, sets=SHORT, tell=told.append))
    assert [row.name for row in rows] == told == names
    heads, *body = study.table(rows)
    assert all(len(line) == len(heads) for line in body)
    assert body[0][-1] == "-", "PCA has no seed to be consistent over"
    assert len(rows[1].consistency) == 1
    assert "+-" in body[1][2]
    assert json.loads(json.dumps(study.as_json(rows)))["floors"]["c_permuted"] < 0.2
    with pytest.raises(SourceError, match="there is no method 'nonsense'"):
        next(study.study(held, 1, only=["nonsense"]))


def test_half_width_by_hand() -> None:
    assert study.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert study.half_width([1.0]) == 0.0
