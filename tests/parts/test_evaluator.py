"""Evaluators: conformance, and known answers recomputed in plain numpy.

Shapes as in spalf/core/values.py; N planted features, P predicted positions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from spalf.core.recipe import Plan
from spalf.core.slots import label
from spalf.core.state import TrainingState
from spalf.core.values import Raw, Sequences, White
from spalf.engine import checkpoint
from spalf.engine.bootstrap import Tally, measured
from spalf.engine.build import build
from spalf.engine.evaluate import untouched
from spalf.engine.language import patch_after_first
from spalf.engine.step import reconstructor
from spalf.errors import CheckpointError
from spalf.parts import evaluator as module
from spalf.parts.evaluator import Consistency, DownstreamLoss, DriftFidelity, Geometry, GroundTruth, SparsityFrontier
from spalf.parts.evaluator.downstream import _measure
from spalf.testing import conform, toy_plan
from spalf.testing.whole import CPU, enter, language_plan, moved, snapshot, stage_for, started, through

pytestmark = pytest.mark.slow  # together more than `make check` has time for

EVALUATORS = [getattr(module, name) for name in module.__all__]
CHECKS = [pytest.param(check, id=f"{label(cls).use}-{check.__name__}") for cls in EVALUATORS for check in conform(cls)]


@pytest.mark.parametrize("check", CHECKS)
def test_conforms(check: Callable[[], None]) -> None:
    check()


# --------------------------------------------------------------------------------------------------- downstream loss
@pytest.fixture(scope="module")
def language() -> tuple[Plan, TrainingState]:
    """A calibrated state on the embedded model whose dictionary is wide enough to be the identity."""
    plan = language_plan(knobs__F="400", strata='["free"]', phase__fit__constraints='["faithfulness"]')
    state = build(plan, CPU)
    through(plan, state, "calibrate")
    enter(plan, state, "fit")
    return plan, state


def make_identity(state: TrainingState) -> None:
    """x_hat = x: rows +e_i and -e_i, of which one has a positive pre-activation; thresholds near 0."""
    sae, d = state.sae, state.metric.d_model
    rows_FD = torch.zeros(sae.width, d)
    rows_FD[:d], rows_FD[d : 2 * d] = torch.eye(d), -torch.eye(d)
    for name, value in (("W_enc_FD", rows_FD), ("W_dec_FD", rows_FD), ("log_gain", torch.tensor(0.0))):
        state.learner.assign(name, value)
    state.learner.assign("_activator.log_threshold_F", torch.full((sae.width,), -20.0))


def make_mean(state: TrainingState) -> None:
    """x_hat = mean: nothing is decoded."""
    state.learner.assign("W_dec_FD", torch.zeros(state.sae.width, state.metric.d_model))
    state.learner.assign("b_dec_D", torch.zeros(state.metric.d_model))


def test_a_perfect_dictionary_recovers_all(language: tuple[Plan, TrainingState]) -> None:
    plan, state = language
    make_identity(state)
    x_BD = state.stream.held_out().next(64).x_BD
    assert torch.allclose(reconstructor(state)(x_BD), x_BD, atol=1e-3)
    out = DownstreamLoss(sequences=4)(plan, state)
    assert out["loss_recovered"] == pytest.approx(1.0, abs=1e-4)
    assert out["loss_recovered_zero"] == pytest.approx(1.0, abs=1e-4)
    assert out["kl"] == pytest.approx(0.0, abs=1e-5)
    assert out["ce_gap"] == pytest.approx(0.0, abs=1e-4)
    assert out["ce_mean_ablated"] > out["ce_clean"] + 1.0, "ablation has to cost something for a ratio to mean anything"


def test_the_mean_recovers_nothing(language: tuple[Plan, TrainingState]) -> None:
    plan, state = language
    make_mean(state)
    out = DownstreamLoss(sequences=4)(plan, state)
    assert out["loss_recovered"] == pytest.approx(0.0, abs=1e-4)
    assert out["kl"] == pytest.approx(out["kl_mean_ablated"], rel=1e-4)
    assert out["ce_patched"] == pytest.approx(out["ce_mean_ablated"], rel=1e-5)
    assert abs(out["ce_zero_ablated"] - out["ce_mean_ablated"]) > 1e-3, "the two ablations are different things"


def log_softmax(logits: Tensor) -> np.ndarray[Any, Any]:
    x = logits.detach().double().numpy()
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_losses_against_numpy() -> None:
    """Means over all predicted positions of all contexts, then differences and ratios; position 0 stays clean."""
    plan, state = stage_for(frozenset({"logits"}))
    out = DownstreamLoss(sequences=10)(plan, state)
    sequences: Sequences = state.stream.held_out().sequences(10)
    tokens = sequences.tokens_ST.numpy()
    mean_D = state.metric.raw(White(torch.zeros(plan.facts.d_model)))
    patches: dict[str, Callable[[Raw], Raw]] = {
        "patched": reconstructor(state),
        "mean_ablated": lambda x: Raw(mean_D.expand_as(x)),
        "zero_ablated": lambda x: Raw(torch.zeros_like(x)),
    }
    clean = log_softmax(state.stream.logits(sequences))

    def ce(log_p: np.ndarray[Any, Any]) -> float:
        return float(-np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], -1).mean())

    found, kl = {"clean": ce(clean)}, {}
    for name, patch in patches.items():
        log_q = log_softmax(state.stream.logits(sequences, patch_after_first(patch)))
        found[name] = ce(log_q)
        kl[name] = float((np.exp(clean) * (clean - log_q)).sum(-1)[:, :-1].mean())
    for name, value in found.items():
        assert out[f"ce_{name}"] == pytest.approx(value, rel=1e-5), name
    recovered = (found["mean_ablated"] - found["patched"]) / (found["mean_ablated"] - found["clean"])
    assert out["loss_recovered"] == pytest.approx(recovered, abs=1e-4)
    assert out["ce_gap"] == pytest.approx(found["patched"] - found["clean"], abs=1e-5)
    assert out["kl"] == pytest.approx(kl["patched"], rel=1e-4)
    assert out["kl_mean_ablated"] == pytest.approx(kl["mean_ablated"], rel=1e-4)
    assert out["positions"] == tokens[:, 1:].size


def test_no_share_of_an_ablation_that_costs_nothing() -> None:
    ce = {"clean": 3.0, "patched": 3.2, "mean_ablated": 4.0, "zero_ablated": 3.0}
    tally = Tally()
    tally.add(
        torch.arange(3),
        n=torch.ones(3),
        gap_square=torch.full((3,), 0.04),
        **{f"ce.{name}": torch.full((3,), value, dtype=torch.float64) for name, value in ce.items()},
        **{name: torch.ones(3) for name in ("kl.patched", "kl.mean_ablated", "n.early", "n.late")},
        **{name: torch.ones(3) for name in ("gap.early", "gap.late")},
    )
    report = measured(tally.samples(_measure))
    assert report["loss_recovered"] == pytest.approx(0.8)
    assert report["ce_gap"] == pytest.approx(0.2)
    assert report["ce_gap.position_std"] == pytest.approx(0.0, abs=1e-7)
    assert "loss_recovered_zero" not in report


def test_the_spread_of_the_loss_against_numpy() -> None:
    plan, state = stage_for(frozenset({"logits"}))
    out = DownstreamLoss(sequences=10)(plan, state)
    sequences: Sequences = state.stream.held_out().sequences(10)
    assert sequences.document_ST is not None
    tokens, document = sequences.tokens_ST.numpy(), sequences.document_ST.numpy()[:, 1:]
    clean = log_softmax(state.stream.logits(sequences))
    patched = log_softmax(state.stream.logits(sequences, patch_after_first(reconstructor(state))))
    gap = -np.take_along_axis(patched[:, :-1] - clean[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    kl = (np.exp(clean) * (clean - patched)).sum(-1)[:, :-1]
    quarter = np.arange(gap.shape[1]) / gap.shape[1]
    assert out["ce_gap.early"] == pytest.approx(gap[:, quarter < 0.25].mean(), abs=1e-5)
    assert out["ce_gap.late"] == pytest.approx(gap[:, quarter >= 0.75].mean(), abs=1e-5)
    assert out["ce_gap.position_std"] == pytest.approx(gap.std(), rel=1e-4)
    assert out["kl.position_p99"] == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    means = [gap[document == d].mean() for d in np.unique(document)]
    assert out["documents"] == len(means) > 2
    assert out["ce_gap.document_mean"] == pytest.approx(np.mean(means), abs=1e-5)
    assert out["ce_gap.document_std"] == pytest.approx(np.std(means), rel=1e-3)
    assert out["ce_gap.ci_low"] < out["ce_gap"] < out["ce_gap.ci_high"]


# ---------------------------------------------------------------------------------------------------- drift fidelity
DRIFT = ("cosine_mean", "cosine_min", "own_token", "promotes_own", "promotes_own_top")


def test_anchored_rows_start_on_their_anchors() -> None:
    plan = language_plan()
    state = build(plan, CPU)
    through(plan, state, "calibrate")
    out = DriftFidelity()(plan, state)
    assert set(out) == {f"anchored.{name}" for name in DRIFT}
    for name in DRIFT[:3]:
        assert out[f"anchored.{name}"] == pytest.approx(1.0, abs=1e-5), name
    unembedding_VD, anchor = state.stream.unembedding().numpy(), state.anchors["anchored"]
    logits = anchor.directions_AD.numpy() @ unembedding_VD.T
    ranks = (logits > np.take_along_axis(logits, anchor.ids_A.numpy()[:, None], 1)).sum(1)
    assert out["anchored.promotes_own"] == pytest.approx((ranks == 0).mean())
    assert out["anchored.promotes_own_top"] == pytest.approx((ranks < 10).mean())
    # turn row 3 until it is 60 degrees from its own anchor, and lay row 5 on another's
    anchor_AD, rows = state.anchors["anchored"].directions_AD, state.sae.rows["anchored"]
    aside_D = normalize(torch.randn(plan.facts.d_model), dim=0)
    aside_D = normalize(aside_D - (aside_D @ anchor_AD[3]) * anchor_AD[3], dim=0)
    turned_D = 0.5 * anchor_AD[3] + 0.75**0.5 * aside_D
    with torch.no_grad():
        state.sae.W_dec_FD[rows.start + 3] = 7.0 * state.metric.white_direction(Raw(turned_D))
        state.sae.W_dec_FD[rows.start + 5] = state.metric.white_direction(Raw(anchor_AD[6]))
    n, other = len(anchor_AD), float(anchor_AD[5] @ anchor_AD[6])
    out = DriftFidelity()(plan, state)
    assert out["anchored.cosine_mean"] == pytest.approx((n - 2 + 0.5 + other) / n, abs=1e-5)
    assert out["anchored.cosine_min"] == pytest.approx(min(0.5, other), abs=1e-5)
    assert out["anchored.own_token"] == pytest.approx((n - 1) / n)


def test_no_anchors_no_drift() -> None:
    plan = toy_plan()
    assert DriftFidelity()(plan, build(plan, CPU)) == {}


# ------------------------------------------------------------------------------------------------------ ground truth
def planted(**sets: str) -> tuple[Plan, TrainingState]:
    """A state that is not trained, in model space: the metric is the identity."""
    plan = toy_plan(whitener="identity", **sets)
    return plan, build(plan, CPU)


def test_the_truth_in_any_order_is_recovered() -> None:
    plan, state = planted()
    truth_ND = state.stream.truth()
    order = torch.randperm(plan.knobs.F, generator=torch.Generator().manual_seed(3))[: len(truth_ND)]
    rows_FD = torch.eye(plan.facts.d_model)[0].repeat(plan.knobs.F, 1)
    rows_FD[order] = truth_ND * -torch.linspace(0.1, 9.0, len(truth_ND))[:, None]
    state.learner.assign("W_dec_FD", rows_FD)
    out = GroundTruth(rows=2048)(plan, state)
    assert out["mcc"] == pytest.approx(1.0, abs=1e-6), "scale, sign and order mean nothing"
    wanted = np.mean([floor(truth_ND, plan.knobs.F, seed) for seed in range(20)])
    assert out["mcc_floor"] == pytest.approx(wanted, abs=0.03)
    assert out["uniqueness"] == 1.0


def test_two_features_that_share_a_latent_are_not_unique() -> None:
    plan, state = planted(source__features="8")
    truth_ND = state.stream.truth()
    rows_FD = truth_ND[0].repeat(plan.knobs.F, 1)
    rows_FD[1:6] = truth_ND[1:6]
    rows_FD[6] = truth_ND[6] + truth_ND[7]
    state.learner.assign("W_dec_FD", rows_FD)
    assert GroundTruth(rows=2048)(plan, state)["uniqueness"] == pytest.approx(7 / 8)


def floor(truth_ND: Tensor, width: int, seed: int) -> float:
    """Mean |cosine| of the best assignment to random directions, in numpy."""
    draw = np.random.default_rng(seed)
    rows = draw.standard_normal((width, truth_ND.shape[1]))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = np.abs(truth_ND.double().numpy() @ rows.T)
    return float(cosine[linear_sum_assignment(-cosine)].mean())


def test_a_random_dictionary_is_at_the_floor() -> None:
    plan, state = planted()
    floors = [floor(state.stream.truth(), plan.knobs.F, seed) for seed in range(20)]
    found = []
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        state.learner.assign("W_dec_FD", torch.randn(plan.knobs.F, plan.facts.d_model, generator=draw))
        found.append(GroundTruth(rows=2048)(plan, state)["mcc"])
    assert 0.3 < np.mean(floors) < 0.8, "in few dimensions chance alone matches a good deal"
    assert np.mean(found) == pytest.approx(np.mean(floors), abs=3 * np.std(floors))
    assert max(found) < 0.85


def test_a_detector_of_every_feature_has_f1_of_1() -> None:
    """Fewer features than dimensions: p = dual_n (x - bias) is feature n's code, with dual_n d_m = 1[n = m]."""
    plan, state = planted(source__features="8", source__least="0.05")
    truth_ND = state.stream.truth()
    dual_ND = torch.linalg.pinv(truth_ND).T
    bias_D = state.stream._world.bias_D  # type: ignore[attr-defined]
    rows_FD = torch.zeros(plan.knobs.F, plan.facts.d_model)
    rows_FD[:8] = dual_ND
    state.learner.assign("W_enc_FD", rows_FD)
    state.learner.assign("W_dec_FD", torch.cat([truth_ND, -1e-3 * torch.ones(plan.knobs.F - 8, plan.facts.d_model)]))
    state.learner.assign("b_enc_F", -rows_FD @ bias_D)
    state.learner.assign("_activator.log_threshold_F", torch.full((plan.knobs.F,), 0.1).log())
    out = GroundTruth(rows=4096)(plan, state)
    assert (out["f1"], out["precision"], out["recall"]) == (1.0, 1.0, 1.0)
    # a latent that fires always: its recall is 1 and its precision the feature's firing rate
    state.learner.assign("b_enc_F", torch.full((plan.knobs.F,), 1e4))
    rates = []
    held = state.stream.held_out()
    for _ in range(2):
        rates.append((held.next(2048).truth_BN > 0).double().mean(0))
    rate_N = torch.stack(rates).mean(0)
    out = GroundTruth(rows=4096)(plan, state)
    assert out["recall"] == 1.0
    assert out["precision"] == pytest.approx(float(rate_N.mean()))
    assert out["f1"] == pytest.approx(float((2 * rate_N / (1 + rate_N)).mean()))


# -------------------------------------------------------------------------------------------------------- frontier
def test_frontier_against_numpy_and_monotone() -> None:
    plan = toy_plan(source__bias="40.0")
    state = started(plan)
    scales = (0.5, 1.0, 2.0, 5.0)
    out = SparsityFrontier(multipliers=scales, rows=3000)(plan, state)
    assert set(out) == {f"{name}@{s:g}" for s in scales for name in ("l0", "r2_raw")}
    l0 = [out[f"l0@{s:g}"] for s in scales]
    assert l0 == sorted(l0, reverse=True)
    assert len(set(l0)) == len(l0)
    x = state.stream.held_out().next(3000).x_BD
    hat = reconstructor(state)(x).detach().double().numpy()
    wide = x.double().numpy()
    fvu = ((wide - hat) ** 2).sum() / ((wide - wide.mean(0)) ** 2).sum()
    assert out["r2_raw@1"] == pytest.approx(1 - fvu, abs=1e-4)
    assert out["l0@1"] == pytest.approx(float(state.sae.encode(state.metric.white(x)).l0_B().detach().mean()))


def test_frontier_at_1_is_the_trained_language_loss() -> None:
    plan, state = stage_for(frozenset({"logits"}))
    before = snapshot(state)
    frontier = SparsityFrontier(multipliers=(1.0,), rows=512, sequences=8)(plan, state)
    loss = DownstreamLoss(sequences=8)(plan, state)
    assert frontier["ce@1"] == pytest.approx(loss["ce_patched"], rel=1e-5)
    assert moved(before, snapshot(state)) == []


@pytest.mark.parametrize(
    "activation",
    [
        '{ use = "topk", k = 6 }',
        '{ use = "batch_topk", k = 6 }',
        '{ use = "relu" }',
        '{ use = "gated" }',
    ],
)
def test_frontier_of_every_kind_of_activation_starts_from_the_trained_code(activation: str) -> None:
    plan = toy_plan(activation=activation)
    state = build(plan, CPU)
    through(plan, state, "calibrate")
    with torch.no_grad():
        for name, value in dict(state.sae.named_parameters()).items():
            if name.startswith("_activator."):
                value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    out = SparsityFrontier(multipliers=(1.0, 1.5, 2.0), rows=512)(plan, state)
    with untouched(state):
        code = state.sae.encode(state.metric.white(state.stream.next(512).x_BD))
    assert out["l0@1"] == pytest.approx(float(code.l0_B().mean()))
    assert out["l0@1"] > out["l0@1.5"] > out["l0@2"] > 0


# -------------------------------------------------------------------------------------------------------- geometry
def test_geometry_of_an_orthonormal_frame() -> None:
    plan, state = planted(knobs__F="32", strata='["free"]')
    d = plan.facts.d_model
    eye_DD = torch.eye(d)
    state.learner.assign("W_dec_FD", torch.cat([3.0 * eye_DD, -eye_DD])[:32])
    out = Geometry()(plan, state)
    assert out["coherence"] == out["coherence_mean"] == pytest.approx(1.0)
    assert out["duplicates"] == 0.0, "the opposite direction is another one"
    assert out["frame_energy"] == pytest.approx(0.0, abs=1e-12)
    assert out["cosine_square"] == pytest.approx(32 / (32 * 31))
    assert out["welch"] == pytest.approx(((32 - d) / (d * 31)) ** 0.5)
    rows_FD = torch.cat([eye_DD, eye_DD[:16]])[:32]
    state.learner.assign("W_dec_FD", rows_FD)
    out = Geometry()(plan, state)
    assert out["duplicates"] == 1.0


def test_geometry_against_numpy_for_each_stratum() -> None:
    plan, state = stage_for(frozenset({"logits"}))
    out = Geometry(duplicate=0.5)(plan, state)
    rows = state.metric.raw_direction(White(state.sae.W_dec_FD.detach())).double().numpy()
    for name, span in {"": slice(None), **state.sae.rows}.items():
        unit = rows[span] / np.linalg.norm(rows[span], axis=1, keepdims=True)
        cosine = unit @ unit.T - np.eye(len(unit))
        wanted = {
            "coherence": np.abs(cosine).max(),
            "coherence_mean": np.abs(cosine).max(1).mean(),
            "duplicates": (cosine.max(1) > 0.5).mean(),
            "cosine_square": (cosine**2).sum() / (len(unit) * (len(unit) - 1)),
            "frame_energy": ((unit.T @ unit / len(unit) - np.eye(unit.shape[1]) / unit.shape[1]) ** 2).sum(),
        }
        for key, value in wanted.items():
            assert out[f"{name}.{key}" if name else key] == pytest.approx(value, abs=1e-5), (name, key)
    assert 0 < out["coactivation"] < 1


def test_coactivation_counts_pairs_that_fire_together() -> None:
    plan = toy_plan(whitener="identity")
    state = started(plan)
    state.learner.assign("W_dec_FD", torch.eye(plan.facts.d_model)[0].repeat(plan.knobs.F, 1))
    assert Geometry(sample=256)(plan, state)["coactivation"] == pytest.approx(1.0)


# ----------------------------------------------------------------------------------------------------- consistency
def saved(plan: Plan, state: TrainingState, at: Path) -> str:
    return str(checkpoint.save(plan, state, at, "", {"serial": 1}))


def test_a_run_agrees_with_itself_in_any_order(tmp_path: Path) -> None:
    plan = toy_plan()
    state = started(plan)
    path = saved(plan, state, tmp_path)
    order = torch.randperm(plan.knobs.F)
    state.learner.assign("W_dec_FD", 2.0 * state.sae.W_dec_FD[order])
    out = Consistency(runs=(path,))(plan, state)
    assert out["pw_mcc"] == pytest.approx(1.0, abs=1e-5)
    assert out["shared"] == 1.0
    state.learner.assign("W_dec_FD", -state.sae.W_dec_FD)
    assert Consistency(runs=(path,))(plan, state)["pw_mcc"] < 0.9, "a feature has a sign"


def test_random_dictionaries_are_at_the_floor(tmp_path: Path) -> None:
    plan = toy_plan(whitener="identity")
    state = build(plan, CPU)
    paths = []
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        state.learner.assign("W_dec_FD", torch.randn(plan.knobs.F, plan.facts.d_model, generator=draw))
        paths.append(saved(plan, state, tmp_path / str(seed)))
    out = Consistency(runs=tuple(paths[:2]))(plan, state)
    assert out["pw_mcc"] == pytest.approx(out["pw_mcc_floor"], abs=0.05)
    assert 0.2 < out["pw_mcc_floor"] < 0.8
    assert out["dictionaries"] == 3.0


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    plan = toy_plan()
    state = build(plan, CPU)
    with pytest.raises(CheckpointError, match="no such directory"):
        Consistency(runs=(str(tmp_path / "nowhere"),))(plan, state)
    other = toy_plan(whitener="identity")
    path = saved(other, build(other, CPU), tmp_path)
    with pytest.raises(
        CheckpointError, match=r'is whitened by "identity" and this run by "soft_zca" \(use spalf compare'
    ):
        Consistency(runs=(path,))(plan, state)
    wide = toy_plan(source__d_model="24")
    path = saved(wide, build(wide, CPU), tmp_path / "wide")
    with pytest.raises(CheckpointError, match="has d_model 24 and this run 16"):
        Consistency(runs=(path,))(plan, state)
    (Path(path) / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="its decoder cannot be read"):
        Consistency(runs=(path,))(wide, build(wide, CPU))
