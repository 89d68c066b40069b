"""Scaled thresholds: the asked L0 to one entry, and the trained code at 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from spalf.core.state import TrainingState
from spalf.core.values import Raw, White
from spalf.engine.build import build
from spalf.engine.frontier import r2_at_l0, rescaled, scale_for_l0
from spalf.testing import toy_plan
from spalf.testing.whole import started, through


@pytest.fixture(scope="module")
def rows() -> tuple[TrainingState, Raw, White]:
    """A state in the middle of training and 3000 held-out rows, which is more than one chunk."""
    state = started(toy_plan())
    x_BD = state.stream.held_out().next(3000).x_BD
    with torch.no_grad():
        return state, x_BD, state.metric.white(x_BD)


@pytest.mark.parametrize("l0", [1 / 3000, 0.5, 2.0, 6.0, 13.37, 22.0])
def test_the_scale_gives_the_l0(rows: tuple[TrainingState, Raw, White], l0: float) -> None:
    state, _, white_BD = rows
    with torch.no_grad():
        code = rescaled(state, white_BD, scale_for_l0(state, white_BD, l0))
    assert int(code.gate_BK.sum()) == round(l0 * 3000)


def test_no_feature_and_all_features(rows: tuple[TrainingState, Raw, White]) -> None:
    state, _, white_BD = rows
    with torch.no_grad():
        assert int(rescaled(state, white_BD, scale_for_l0(state, white_BD, 0.0)).gate_BK.sum()) == 0
        pre_BF = state.sae.encode(white_BD, dense=True).pre_BK
        most = int((pre_BF > 0.05 * state.sae.activator.threshold_F()).sum())
        assert int(rescaled(state, white_BD, scale_for_l0(state, white_BD, 64.0)).gate_BK.sum()) == most


def test_scale_1_is_the_trained_code(rows: tuple[TrainingState, Raw, White]) -> None:
    state, _, white_BD = rows
    with torch.no_grad():
        ours, trained = rescaled(state, white_BD, 1.0), state.sae.encode(white_BD)
        assert torch.equal(ours.dense(), trained.dense())
        l0 = float(trained.l0_B().mean())
        assert scale_for_l0(state, white_BD, l0) == pytest.approx(1.0, abs=1e-3)


def test_fewer_features_explain_less(rows: tuple[TrainingState, Raw, White]) -> None:
    state, x_BD, _ = rows
    with torch.no_grad():
        r2 = [r2_at_l0(state, x_BD, l0, "raw") for l0 in (1.0, 3.0, 10.0, 22.0)]
    assert r2 == sorted(r2)
    assert r2[0] < r2[-1] - 0.2


@pytest.mark.parametrize("space", ["raw", "white"])
def test_r2_against_numpy(rows: tuple[TrainingState, Raw, White], space: str) -> None:
    state, x_BD, white_BD = rows
    with torch.no_grad():
        out = r2_at_l0(state, x_BD, 5.0, space)
        scale = scale_for_l0(state, white_BD, 5.0)
        sae = state.sae
        pre = (white_BD @ sae.W_enc_FD.T + sae.b_enc_F).numpy()
        z = np.where(pre > scale * sae.activator.threshold_F().numpy(), pre, 0.0)
        hat = float(sae.log_gain.exp()) * z @ sae.W_dec_FD.numpy() + sae.b_dec_D.numpy()
        error = white_BD.numpy() - hat
        if space == "raw":
            error = x_BD.numpy() - state.metric.raw(White(torch.from_numpy(hat).float())).numpy()
    fvu = (error.astype(np.float64) ** 2).sum(1).mean() / float(state.metric.variance(space))
    assert out == pytest.approx(1 - fvu, abs=1e-4)


KINDS = {
    "relu": '{ use = "relu" }',
    "topk": '{ use = "topk" }',
    "batch_topk": '{ use = "batch_topk" }',
    "gated": '{ use = "gated", start = 2.0 }',
}


def other(kind: str) -> tuple[TrainingState, Raw, White]:
    """A calibrated state of another activation, every parameter of it away from its start, and rows."""
    plan = toy_plan(activation=KINDS[kind], phase__fit__terms='["mse"]', term__mse="{}", phase__fit__constraints="[]")
    state = build(plan, torch.device("cpu"))
    through(plan, state, "calibrate")
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in state.sae.named_parameters():
            if "_mag_F" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw).abs())
        x_BD = state.stream.held_out().next(3000).x_BD
        return state, x_BD, state.metric.white(x_BD)


@pytest.mark.parametrize("kind", KINDS)
def test_scale_1_is_the_trained_code_of_every_activation(kind: str) -> None:
    state, _, white_BD = other(kind)
    with torch.no_grad():
        torch.testing.assert_close(
            rescaled(state, white_BD, 1.0).dense(), state.sae.encode(white_BD, dense=True).dense()
        )


def test_topk_scales_its_k() -> None:
    state, _, white_BD = other("topk")
    with torch.no_grad():
        assert [float(rescaled(state, white_BD, scale).l0_B().max()) for scale in (0.5, 2.0, 100.0)] == [12.0, 3.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_activation_reaches_an_l0(kind: str) -> None:
    """Fewer features explain less, and at its own L0 a dictionary explains what its code does."""
    state, x_BD, white_BD = other(kind)
    r2 = [r2_at_l0(state, x_BD, l0, "raw") for l0 in (1.0, 2.0, 5.0)]
    assert all(math.isfinite(v) for v in r2)
    assert r2 == sorted(r2)
    with torch.no_grad():
        code = state.sae.encode(white_BD, dense=True)
        error = state.metric.raw_direction(White(white_BD - state.sae.decode(code))).square().sum(1).mean()
        own = 1 - float(error) / float(state.metric.variance("raw"))
        assert r2_at_l0(state, x_BD, float(code.l0_B().mean()), "raw") == pytest.approx(own, abs=0.05)
