"""The presets of the standard family on the embedded model: each runs, saves, loads, evaluates and resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import spalf
from spalf.core.state import TrainingState
from spalf.engine.export import fold

PRESETS = ("relu_l1", "topk", "batch_topk", "gated", "jumprelu", "matryoshka")
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SMALL = (
    "knobs.F=512",
    "knobs.L0_target=16",
    "knobs.lr=3e-3",
    "budget.tokens=40_960",
    "budget.batch=256",
    "record.log_every=20",
    "phase.calibrate.samples=8192",
    "source.shuffle=16_384",
    "source.pool=64",
    "evaluator.downstream_loss={ sequences = 8 }",
)
WARMUP = {"relu_l1": ("term.l1.warmup=10",), "gated": ("term.l1.warmup=10",), "jumprelu": ("term.l0.warmup=10",)}


def settings(name: str) -> tuple[str, ...]:
    return (*SMALL, *WARMUP.get(name, ()))


@pytest.fixture(scope="module", params=PRESETS)
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """A preset's recipe, 160 steps of it, cut in the middle and resumed."""
    name, out = request.param, tmp_path_factory.mktemp("baselines")
    spalf.run(RECIPES / f"{name}.toml", sets=settings(name), out=out, device="cpu", stop_at=90)
    result = spalf.resume(out / name, device="cpu")
    return name, out / name, result.summary


@pytest.mark.slow
def test_a_preset_trains_saves_loads_and_evaluates(ended: tuple[str, Path, dict[str, Any]]) -> None:
    name, directory, summary = ended
    assert (summary["outcome"], summary["step"], summary["feasible"]) == ("done", 160, None)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    fitted = [line for line in lines if line["phase"] == "fit"]
    assert fitted[-1]["r2_raw"] > fitted[0]["r2_raw"], "training has explained nothing"
    assert summary["r2_raw"] > 0.3
    assert summary["loss_recovered"] > 0.5
    if name == "topk":
        assert summary["l0"] <= 16
    if name in ("batch_topk", "matryoshka"):
        assert summary["l0"] == pytest.approx(16, rel=0.25), "one threshold at inference, k on average"
    loaded = spalf.load(directory, device="cpu")
    again = spalf.evaluate(directory, only=("dictionary",), device="cpu")
    assert again["dictionary"]["l0"] == pytest.approx(summary["l0"])
    assert not loaded.state.sae.training
    assert torch.isfinite(loaded.encode("def f(x):\n    return x\n").dense()).all()


@pytest.mark.slow
def test_the_folded_dictionary_is_the_trained_one(ended: tuple[str, Path, dict[str, Any]]) -> None:
    _, directory, _ = ended
    state: TrainingState = spalf.load(directory, device="cpu").state
    x_BD = state.stream.held_out().next(512).x_BD
    folded = fold(state.metric, state.sae)
    with torch.no_grad():
        code = state.sae.encode(state.metric.white(x_BD), dense=True)
        hat_BD = state.metric.raw(state.sae.decode(code))
        p_BF = x_BD.double() @ folded["W_enc"].T + folded["b_enc"]
        gate_BF = p_BF > folded["threshold"]
        if state.sae.activator.k:
            sort_BF = p_BF / folded["scale"]
            gate_BF &= sort_BF >= sort_BF.topk(state.sae.activator.k, dim=1).values[:, -1:]
        ours_BD = (p_BF * gate_BF) @ folded["W_dec"] + folded["b_dec"]
    assert float((gate_BF != (code.gate_BK > 0)).double().mean()) < 1e-5, "another support"
    assert float((ours_BD - hat_BD).norm() / hat_BD.norm()) < 1e-3
    assert math.isfinite(float(ours_BD.sum()))
