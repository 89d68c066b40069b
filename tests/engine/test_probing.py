"""Probes: optimality conditions, brute force, and independence of scale and chunking.

Shapes: N rows, K inputs, C classes, F features.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spalf.engine.probing import Contrast, best_f1, f1, logistic


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x_NK = torch.randn(400, 5, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1, 1.0, 3.0]) + 2.0
    true_CK = torch.tensor([[2.0, 0.0, 0.0, -1.0, 0.0], [0.0, 0.1, 5.0, 0.0, 0.0]], dtype=torch.float64)
    noise_NC = torch.randn(400, 2, generator=draw, dtype=torch.float64)
    return x_NK, (x_NK - 2.0) @ true_CK.T + noise_NC > 0


def test_the_gradient_vanishes() -> None:
    """d/dw of mean log loss + l2/2 |w|^2 on standardised inputs, in numpy."""
    x_NK, y_NC = rows()
    probe = logistic(x_NK, y_NC, l2=0.01)
    x, y = x_NK.numpy(), y_NC.numpy().astype(float)
    z = (x - x.mean(0)) / x.std(0)
    weight = probe.weight_CK.numpy() * x.std(0)
    slope = (1 / (1 + np.exp(-probe.score(x_NK).numpy())) - y) / len(x)
    assert np.abs(slope.T @ z + 0.01 * weight).max() < 1e-5
    assert np.abs(slope.sum(0)).max() < 1e-5


def test_units_of_the_inputs_mean_nothing() -> None:
    x_NK, y_NC = rows()
    units = torch.tensor([3.0, 0.01, 100.0, 1.0, 0.2], dtype=torch.float64)
    near = logistic(x_NK, y_NC).score(x_NK)
    far = logistic(x_NK * units + 5.0, y_NC).score(x_NK * units + 5.0)
    assert torch.allclose(near, far, atol=1e-3)


def test_it_learns_what_is_there_and_float32_is_enough() -> None:
    x_NK, y_NC = rows()
    wide, narrow = logistic(x_NK, y_NC), logistic(x_NK.float(), y_NC)
    assert float(((wide.score(x_NK) > 0) == y_NC).double().mean()) > 0.8
    assert torch.allclose(wide.weight_CK, narrow.weight_CK, rtol=0.02, atol=1e-3)


def test_an_input_without_variance_weighs_nothing() -> None:
    x_NK, y_NC = rows()
    x_NK[:, 1] = 7.0
    probe = logistic(x_NK, y_NC)
    assert probe.weight_CK[:, 1].tolist() == [0.0, 0.0]
    assert bool(probe.score(x_NK).isfinite().all())


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=12))
def test_best_f1_is_brute_force_s(pairs: list[tuple[int, bool]]) -> None:
    score_N = torch.tensor([float(s) for s, _ in pairs])
    true_N = torch.tensor([t for _, t in pairs])
    found, threshold = best_f1(score_N, true_N)
    wanted = max(f1(score_N > at, true_N) for at in np.arange(-4.5, 4.5))
    assert found == pytest.approx(wanted)
    assert f1(score_N > threshold, true_N) == pytest.approx(found)


def test_f1_of_nothing_is_0() -> None:
    nothing_N = torch.zeros(3, dtype=torch.bool)
    assert f1(nothing_N, nothing_N) == 0.0
    assert f1(~nothing_N, ~nothing_N) == 1.0


def test_contrast_against_numpy_in_any_chunks() -> None:
    draw = torch.Generator().manual_seed(0)
    z_NF = torch.randn(300, 12, generator=draw).relu()
    side_NC = torch.randint(3, (300, 2), generator=draw)  # 0 inside, 1 against, 2 neither
    z_NF[:, 4] += 3.0 * (side_NC[:, 0] == 0)
    z_NF[:, 7] += 1.5 * (side_NC[:, 0] == 1)
    contrast = Contrast(2, 12, torch.device("cpu"))
    for part in torch.arange(300).split(70):
        contrast.add(z_NF[part], side_NC[part] == 0, side_NC[part] == 1)
    z, side = z_NF.double().numpy(), side_NC.numpy()
    for c, top in enumerate(contrast.top(12).tolist()):
        apart = np.abs(z[side[:, c] == 0].mean(0) - z[side[:, c] == 1].mean(0)) / z.std(0)
        assert top == np.argsort(-apart).tolist()
    assert contrast.top(2)[0].tolist() == [4, 7]
