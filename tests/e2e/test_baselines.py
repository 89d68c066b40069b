"""The presets of the standard family on the embedded model: each runs, saves, loads and evaluates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import spalf
from spalf.engine import evaluate as measuring
from spalf.engine.export import fold
from spalf.loaded import Loaded

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


class Ended(NamedTuple):
    """A finished run: its preset, directory, summary, and its newest checkpoint."""

    name: str
    directory: Path
    summary: dict[str, Any]
    loaded: Loaded


def settings(name: str) -> tuple[str, ...]:
    return (*SMALL, *WARMUP.get(name, ()))


@pytest.fixture(scope="module", params=PRESETS)
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    """A preset's recipe, 160 steps of it, and what its checkpoint loads to; measured on few rows."""
    name, out = request.param, tmp_path_factory.mktemp("baselines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "ROWS", 8192)
        result = spalf.run(RECIPES / f"{name}.toml", sets=settings(name), out=out, device="cpu")
        yield Ended(name, out / name, result.summary, spalf.load(out / name, device="cpu"))


@pytest.mark.slow
def test_a_preset_trains_saves_and_loads(ended: Ended) -> None:
    name, directory, summary, loaded = ended
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
    assert not loaded.state.sae.training
    again = measuring.evaluate(loaded.plan, loaded.state, ["dictionary"])["dictionary"]
    assert again["l0"] == pytest.approx(summary["l0"])
    assert bool(torch.isfinite(loaded.encode("def f(x):\n    return x\n").dense()).all())


@pytest.mark.slow
def test_the_folded_dictionary_is_the_trained_one(ended: Ended) -> None:
    state = ended.loaded.state
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


@pytest.mark.slow
def test_error_at_a_given_sparsity(tmp_path: Path) -> None:
    """The least error subject to L0 <= 16: met on held-out documents, and not by much more than it has to be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "ROWS", 8192)
        sets = (*SMALL, "budget.tokens=163_840", "dual.margin=0.05")
        summary = spalf.run(RECIPES / "sparsity_constrained.toml", sets=sets, out=tmp_path, device="cpu").summary
    assert summary["feasible"], summary["constraints"]
    assert summary["l0"] == pytest.approx(16, rel=0.15)
    assert summary["r2_raw"] > 0.5
    assert 0 < summary["constraints"]["l0_rate"]["multiplier"] < 100
