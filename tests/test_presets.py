"""Presets of the standard family on planted features: their objective, their two modes, and their state on resume."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spalf import plugins
from spalf.assembly import toml
from spalf.assembly.compile import compile
from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.tree import flatten
from spalf.core.values import White
from spalf.engine import checkpoint
from spalf.engine.build import build
from spalf.engine.evaluate import evaluate
from spalf.engine.export import fold
from spalf.testing.whole import CPU, advance, enter, moved, snapshot, through

PRESETS = ("relu_l1", "topk", "batch_topk", "gated", "jumprelu", "matryoshka")
SMALL = """
name = "small"
seed = 1
knobs = { F = 64, L0_target = 6, lr = 3e-3 }
budget = { tokens = 12_800, batch = 128 }
record = { log_every = 10, save_every = 1000, keep = 1 }
source = { use = "synthetic", d_model = 16, features = 32 }
phase.calibrate = { samples = 2048 }
evaluator = { downstream_loss = false }
"""
EACH = pytest.mark.parametrize("name", PRESETS)


@cache
def plan_of(name: str) -> Plan:
    table = toml.merge(toml.read(name), toml.parse(SMALL, "small"))
    for term in ("l0", "l1"):
        if isinstance(table["term"].get(term), dict):
            table = toml.merge(table, {"term": {term: {"warmup": 10}}})
    return compile(table, plugins.registry())


def ready(name: str, steps: int = 0) -> tuple[Plan, TrainingState]:
    """A preset's plan and its state `steps` steps into training."""
    plan = plan_of(name)
    state = build(plan, CPU)
    through(plan, state, "calibrate")
    enter(plan, state, "fit")
    advance(plan, state, steps)
    return plan, state


@EACH
@pytest.mark.slow
def test_training_improves_on_its_start(name: str) -> None:
    plan, state = ready(name)
    before = evaluate(plan, state, ["dictionary"])["dictionary"]
    advance(plan, state, 100)
    after = evaluate(plan, state, ["dictionary"])["dictionary"]
    # L1 trades what it explains at its dense start for fewer features
    assert after["l0"] < 0.7 * before["l0"] if name == "relu_l1" else after["r2_raw"] > before["r2_raw"] + 0.1
    assert after["r2_raw"] > 0.5
    assert after["dead_fraction"] < 0.5
    gain = plan.recipe.optimizer.build([("log_gain", state.sae.log_gain)]).param_groups[0]["lr"]
    assert gain == 0.0
    assert float(state.sae.log_gain.detach().exp()) == pytest.approx(state.measured["gain"])


@EACH
def test_what_each_preset_minimises(name: str) -> None:
    """The objective of the preset's comment, from the weights: what a comparison with a library compares."""
    plan, state = ready(name, 30)
    batch = state.stream.held_out().next(128)
    sae, terms = state.sae, plan.recipe.term
    assert plan.constraints == ()
    assert (
        plan.terms
        == {
            "relu_l1": ("l1", "mse"),
            "topk": ("aux_k", "mse"),
            "batch_topk": ("aux_k", "mse"),
            "gated": ("gated_aux", "l1", "mse"),
            "jumprelu": ("l0", "mse"),
            "matryoshka": ("aux_k", "nested"),
        }[name]
    )
    assert sae.activator.pre_bias
    assert sae.activator.owns_bias == (name == "gated")
    white_BD = state.metric.white(batch.x_BD)
    assert float(white_BD.square().sum(1).mean()) == pytest.approx(16, rel=0.3), "E||y||^2 = d"
    with torch.no_grad():
        code = sae.encode(white_BD, dense=True)
        wanted_BF = (white_BD - sae.b_dec_D) @ sae.W_enc_FD.T + sae.b_enc_F
    torch.testing.assert_close(code.pre_BK, wanted_BF)
    options: dict[str, Any] = {k: getattr(terms[k], "weight", None) for k in plan.terms}
    assert (
        options
        == {
            "relu_l1": {"l1": 2.0, "mse": 1.0},
            "topk": {"aux_k": 1 / 32, "mse": 1.0},
            "batch_topk": {"aux_k": 1 / 32, "mse": 1.0},
            "gated": {"gated_aux": 1.0, "l1": 2.0, "mse": 1.0},
            "jumprelu": {"l0": 1.0, "mse": 1.0},
            "matryoshka": {"aux_k": 1 / 32, "nested": None},
        }[name]
    )


@EACH
@pytest.mark.slow
def test_resumed_it_is_the_uncut_run_to_the_bit(name: str, tmp_path: Path) -> None:
    """Threshold averages included; looking at the state on the way, as evaluators and exporters do, changes nothing."""
    plan, whole = ready(name, 12)
    _, cut = ready(name, 7)
    before = snapshot(cut)
    evaluate(plan, cut)
    fold(cut.metric, cut.sae)
    assert not moved(before, snapshot(cut)), "an evaluation has changed the state"
    at = checkpoint.save(plan, cut, tmp_path, "", {"serial": 1})
    resumed = build(plan, CPU)
    checkpoint.load(at, plan, resumed)
    advance(plan, resumed, 5)
    assert not moved(snapshot(whole), snapshot(resumed))


@EACH
def test_the_folded_dictionary_is_the_trained_one(name: str) -> None:
    """On raw activations, with every bias folded: b_dec subtracted first, a gate's, and the mean."""
    _, state = ready(name, 40)
    sae = state.sae
    wide, metric = sae.double(), state.metric.double()  # type: ignore[attr-defined]
    x_BD = state.stream.held_out().next(256).x_BD.double()
    with torch.no_grad():
        code = wide.encode(metric.white(x_BD), dense=True)
        hat_BD = metric.raw(wide.decode(code))
    folded = fold(metric, wide)
    p_BF = x_BD @ folded["W_enc"].T + folded["b_enc"]
    gate_BF = p_BF > folded["threshold"]
    if sae.activator.k:
        sort_BF = p_BF / folded["scale"]
        gate_BF &= sort_BF >= sort_BF.topk(sae.activator.k, dim=1).values[:, -1:]
    z_BF: Tensor = p_BF * gate_BF
    torch.testing.assert_close(z_BF, code.dense() * folded["scale"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(z_BF @ folded["W_dec"] + folded["b_dec"], hat_BD, rtol=1e-9, atol=1e-9)


def test_in_training_batch_topk_looks_at_the_batch_and_elsewhere_at_its_threshold() -> None:
    plan, state = ready("batch_topk", 20)
    assert not state.sae.training, "a training step puts the mode back"
    seen = float(state.sae.activator.seen)  # type: ignore[attr-defined]
    assert seen == 20
    white_BD = state.metric.white(state.stream.held_out().next(100).x_BD)
    with torch.no_grad():
        l0 = float(state.sae.encode(White(white_BD)).l0_B().mean())
        state.sae.train()
        assert int(state.sae.encode(White(white_BD)).gate_BK.sum()) == 600
        state.sae.eval()  # type: ignore[attr-defined]
    assert l0 == pytest.approx(6, rel=0.3)
    advance(plan, state, 1)
    assert float(state.sae.activator.seen) == seen + 1  # type: ignore[attr-defined]


@EACH
def test_nothing_of_the_state_is_left_out(name: str) -> None:
    """Every number of the dictionary is finite, and b_enc of a gated one has stayed where it was."""
    _, state = ready(name, 20)
    bad = [k for k, v in flatten(state).items() if isinstance(v, Tensor) and not bool(v.isfinite().all())]
    assert not bad
    assert bool(state.sae.b_enc_F.any()) == (name != "gated")
