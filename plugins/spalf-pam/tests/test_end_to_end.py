"""The package as a stranger installs it: its entry point, its recipes, its command, and a run cut and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spalf import compile_recipe, load

RECIPES = sorted((Path(__file__).resolve().parents[3] / "recipes").glob("pam_*.toml"))
SMALL = [
    *("--set", "budget.tokens=30_720"),
    *("--set", "source.shuffle=8192"),
    *("--set", "source.pool=128"),
    *("--set", "phase.calibrate.samples=4096"),
    *("--set", "evaluator.downstream_loss=false"),
]


def spalf(*arguments: str) -> str:
    """Standard output of one command line; fails with its standard error."""
    command = [sys.executable, "-m", "spalf", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_listed_with_their_origin() -> None:
    listed = json.loads(spalf("components", "list", "--json"))
    mine = {(c["slot"], c["name"]) for c in listed if c["origin"].split()[0] == "spalf-pam"}
    assert mine == {("phase", "pam"), ("evaluator", "power_diagram")}


def test_the_command_is_listed() -> None:
    assert "pam " in spalf("--help")
    assert "--mnist" in spalf("pam", "study", "--help")


def test_the_module_is_light() -> None:
    """`spalf --help` imports it."""
    program = "import sys, spalf_pam; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_there_are_recipes() -> None:
    assert [p.stem for p in RECIPES] == ["pam_quickstart", "pam_relu", "pam_topk"]


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_a_recipe_compiles(path: Path) -> None:
    plan = compile_recipe(path)
    assert plan.recipe.name == path.stem
    assert plan.origins["phase.pam"].startswith("spalf-pam ")
    assert plan.constraints == ()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart on 60 steps, whole under `whole`, and cut within the second window and resumed under `cut`."""
    out, recipe = tmp_path_factory.mktemp("runs"), str(RECIPES[0])
    spalf("run", recipe, *SMALL, "--out", str(out / "whole"), "--device", "cpu", "--quiet")
    spalf("run", recipe, *SMALL, "--out", str(out / "cut"), "--device", "cpu", "--stop-at", "55", "--quiet")
    spalf("resume", str(out / "cut" / "pam_quickstart"), "--device", "cpu", "--quiet")
    return out


@pytest.mark.slow
def test_a_run_cut_in_a_window_ends_as_the_whole_one(runs: Path) -> None:
    ends = []
    for name in ("whole", "cut"):
        (last,) = (runs / name / "pam_quickstart" / "checkpoints").glob("spalf_pam_step60")
        ends.append({file.name: file.read_bytes() for file in last.glob("*.safetensors")})
    assert ends[0].keys() == ends[1].keys()
    assert [name for name in ends[0] if ends[0][name] != ends[1][name]] == []


@pytest.mark.slow
def test_the_summary(runs: Path) -> None:
    summary = json.loads((runs / "whole" / "pam_quickstart" / "summary.json").read_text())
    assert summary["outcome"] == "done"
    assert summary["r2_raw"] > 0.4
    power = summary["evaluators"]["power_diagram"]
    assert power["topk"] == power["gates"] == power["signed_2F"] == 1.0
    assert power["signed"] < 0.05


@pytest.mark.slow
def test_the_checkpoint_holds_the_solver(runs: Path) -> None:
    run = runs / "cut" / "pam_quickstart"
    loaded = load(run)
    assert loaded.state.phase.solves == 2
    assert float(loaded.state.phase.sums.count) == 5120
    assert bool((loaded.state.phase.sums.G_FF.diagonal() > 0).all())
    newest = max((run / "checkpoints").iterdir(), key=lambda p: p.stat().st_mtime)
    components = json.loads((newest / "metadata.json").read_text())["components"]
    assert components["phase.pam"].startswith("spalf-pam ")


@pytest.mark.slow
def test_the_decoder_is_what_the_saved_sums_ask_for(runs: Path) -> None:
    """One more solve, from the sums of a checkpoint, changes nothing: they belong to the encoder that was saved."""
    from spalf_pam.solver import Penalties, solve

    state = load(runs / "whole" / "pam_quickstart").state
    w_FD = (state.sae.log_gain.exp() * state.sae.W_dec_FD).detach().double()
    again = solve(state.phase.sums, w_FD, state.sae.b_dec_D.detach(), Penalties(ridge=0.0))
    error = state.phase.sums.error
    least, ours = float(error(again.w_FD, again.b_D)), float(error(w_FD, state.sae.b_dec_D.detach()))
    assert least <= ours < 1.1 * least
