"""The package as a stranger installs it: its entry point, its recipe through the command line, its state on resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "density.toml"


def spalf(*arguments: str) -> str:
    """Standard output of one command line; fails with its standard error."""
    command = [sys.executable, "-m", "spalf", *arguments]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe, stopped on the way and resumed, so that the dual's state has been through a checkpoint."""
    out = tmp_path_factory.mktemp("runs")
    spalf("run", str(RECIPE), "--out", str(out), "--device", "cpu", "--stop-at", "205", "--quiet")
    spalf("resume", str(out / "density"), "--device", "cpu", "--quiet")
    return out / "density"


def test_listed_with_its_origin() -> None:
    listed = json.loads(spalf("components", "list", "--json"))
    mine = {(c["slot"], c["name"]) for c in listed if c["origin"].split()[0] == "spalf-density"}
    assert mine == {("constraint", "density"), ("dual", "optimistic")}


def test_summary(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    density: dict[str, Any] = summary["constraints"]["density"]
    assert summary["outcome"] == "done"
    assert summary["step"] == 400
    assert 0.0 < density["multiplier"] < 1e3, "the constraint does not bind: the recipe shows nothing"
    assert density["filtered"] < 0.2
    assert isinstance(density["feasible"], bool)


def test_the_multiplier_brings_dense_firing_down(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen = [line["constraints"]["density"] for line in lines if line["phase"] == "fit"]
    worst = max(one["fast"] for one in seen)
    assert worst > 0.2, "never violated"
    assert seen[-1]["fast"] < 0.5 * worst


def test_the_checkpoint_names_the_package(run: Path) -> None:
    newest = max((run / "checkpoints").iterdir(), key=lambda p: p.stat().st_mtime)
    components = json.loads((newest / "metadata.json").read_text())["components"]
    assert components["dual.optimistic"].startswith("spalf-density ")
    assert components["constraint.density"].startswith("spalf-density ")
