"""Whiteners: the kit's checks, and what each formula promises."""

import math

import pytest
import torch
from torch import Tensor

from spalf.core import tree
from spalf.core.values import Facts, Raw, White
from spalf.errors import RunError
from spalf.parts.whitener import Dense, Identity, LowRank, Scaled, SoftZca, Zca, spectrum
from spalf.testing import conform, example
from spalf.testing.primal_linear import FACTS, D, checks, fitted, sample

EVERY = (SoftZca, Zca, Identity)


@pytest.mark.parametrize("check", [check for cls in EVERY for check in conform(cls)])
def test_conforms(check) -> None:
    check()


@pytest.mark.parametrize("check", checks(SoftZca, example(SoftZca, low_rank_above=4, variance=0.9)))
def test_low_rank_conforms(check) -> None:
    check()


def mean_and_cov(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    return x_BD.mean(0), torch.cov(x_BD.T, correction=0)


def in_float64(component: SoftZca | Zca, x_BD: Tensor) -> Dense | LowRank:
    """Fitted without the rounding of the matrices to float32."""
    metric = component.build(FACTS)
    assert isinstance(metric, Dense | LowRank)
    metric.double()
    component.fit_(metric, *mean_and_cov(x_BD))
    return metric


def eigenvalues(x_BD: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(mean_and_cov(x_BD)[1]).flip(0)


@pytest.mark.parametrize(
    "component", [SoftZca(), Zca(), SoftZca(low_rank_above=1, variance=0.9)], ids=["soft_zca", "zca", "low_rank"]
)
def test_the_inverse_is_exact_in_float64(component) -> None:
    metric = in_float64(component, sample(flat=3))
    eye = torch.eye(D, dtype=torch.float64)
    product = metric.raw_direction(metric.white_direction(Raw(eye)))
    torch.testing.assert_close(product, Raw(eye), rtol=0, atol=1e-11)
    x_BD = Raw(sample(64))
    torch.testing.assert_close(metric.raw(metric.white(x_BD)), x_BD, rtol=0, atol=1e-10)


def test_round_trip_in_float32() -> None:
    x_BD = Raw(sample().float())
    metric = fitted(SoftZca(), sample())
    error = (metric.raw(metric.white(x_BD)) - x_BD).norm() / x_BD.norm()
    assert float(error) < 2e-6


def test_soft_zca_is_its_formula() -> None:
    x_BD = sample(flat=0)
    metric = in_float64(SoftZca(condition=50.0, variance=0.95), x_BD)
    l_D = eigenvalues(x_BD)
    k = next(k for k in range(1, D + 1) if l_D[:k].sum() >= 0.95 * l_D.sum())
    report = metric.report()
    assert report["rank"] == k
    assert report["alpha"] == pytest.approx(float(l_D[k - 1]) / 50.0)
    alpha = report["alpha"]
    # (S + alpha I) W^2 = I
    W_DD = metric.white_direction(Raw(torch.eye(D, dtype=torch.float64)))
    soft_DD = mean_and_cov(x_BD)[1] + alpha * torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(soft_DD @ W_DD @ W_DD, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-9)
    assert report["condition"] == pytest.approx(float((l_D[0] + alpha) / (l_D[-1] + alpha)))
    assert report["white_variance"] == pytest.approx(float((l_D / (l_D + alpha)).sum()))
    assert report["raw_variance"] == pytest.approx(float(l_D.sum()))


def test_soft_zca_keeps_what_alpha_promises() -> None:
    """Leading variances in [c / (1 + c), 1], noise amplified at most sqrt(1 + c) times direction k, and a condition."""
    x_BD = sample(flat=4)
    metric = in_float64(SoftZca(), x_BD)
    k = int(metric.report()["rank"])
    variances = torch.linalg.eigvalsh(mean_and_cov(metric.white(Raw(x_BD)))[1]).flip(0)
    assert float(variances[0]) <= 1 + 1e-9
    assert float(variances[k - 1]) >= 100 / 101 - 1e-9
    gains = torch.linalg.eigvalsh(metric.white_direction(Raw(torch.eye(D, dtype=torch.float64))))  # 1 / sqrt(l + alpha)
    at_k = (metric.spectrum_D[k - 1] + metric.alpha).rsqrt()
    assert float(gains.max() / at_k) <= math.sqrt(101) + 1e-6
    assert metric.report()["condition"] <= 1 + 100 * D / 0.01


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_low_rank_has_the_leading_directions_and_an_exact_total(share: float) -> None:
    x_BD = sample()
    low = in_float64(SoftZca(low_rank_above=1, variance=share), x_BD)
    full = in_float64(SoftZca(variance=share), x_BD)
    assert isinstance(low, LowRank)
    assert isinstance(full, Dense)
    k = low.gain_K.shape[0]
    assert k < D
    assert low.report()["alpha"] == full.report()["alpha"]
    leading = spectrum(mean_and_cov(x_BD)[1]).U_DD[:, :k].T
    torch.testing.assert_close(low.white_direction(Raw(leading)), full.white_direction(Raw(leading)))
    # d_eff is tr(W S W) of the map that is used, not of the full one.
    torch.testing.assert_close(low.white_variance, low.white(Raw(x_BD)).square().sum(1).mean())


def test_low_rank_stores_less_and_begins_above_its_threshold() -> None:
    facts = Facts(d_model=64)
    assert isinstance(SoftZca(low_rank_above=64).build(facts), Dense)
    low = SoftZca(low_rank_above=63, variance=0.5).build(facts)
    assert isinstance(low, LowRank)
    SoftZca(low_rank_above=63, variance=0.5).fit_(low, torch.zeros(64), torch.diag(torch.logspace(3, -3, 64)))
    assert sum(b.numel() for b in low.buffers()) < 64 * 64 / 4


def test_low_rank_state_brings_its_rank() -> None:
    component = SoftZca(low_rank_above=1, variance=0.9)
    metric = fitted(component, sample())
    poured = tree.restore({"metric": component.build(FACTS)}, tree.flatten({"metric": metric}))["metric"]
    x_BD = Raw(sample(16).float())
    assert torch.equal(poured.white(x_BD), metric.white(x_BD))
    wrong = component.build(Facts(d_model=D + 1))
    with pytest.raises(RuntimeError, match="size mismatch"):
        wrong.load_state_dict(metric.state_dict())


def test_zca_gives_unit_variance_and_bounds_what_has_none() -> None:
    x_BD = sample(flat=0)
    white = in_float64(Zca(), x_BD).white(Raw(x_BD))
    torch.testing.assert_close(torch.cov(white.T, correction=0), torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-9)
    flat = in_float64(Zca(floor=1e-4), sample(flat=3))
    assert flat.report()["condition"] == pytest.approx(1e4)
    assert flat.report()["rank"] < D
    assert flat.report()["white_variance"] < D - 2


def test_identity_is_centring_and_one_scale() -> None:
    x_BD = sample()
    metric = fitted(Identity(), x_BD)
    assert isinstance(metric, Scaled)
    white = metric.white(Raw(x_BD.float()))
    torch.testing.assert_close(white * metric.scale, (x_BD - x_BD.mean(0)).float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(white.square().mean(), torch.ones(()), rtol=1e-4, atol=0)
    assert float(metric.variance("white")) == pytest.approx(D)
    assert metric.report()["condition"] == 1


def test_before_a_fit_a_metric_is_the_identity() -> None:
    x_BD = Raw(torch.randn(3, D))
    for component in (SoftZca(), SoftZca(low_rank_above=1), Zca(), Identity()):
        metric = component.build(FACTS)
        torch.testing.assert_close(metric.white(x_BD), White(x_BD))


def test_half_precision_is_raised_and_gradients_pass() -> None:
    metric = fitted(SoftZca(), sample())
    x_BD = torch.randn(3, 2, D, dtype=torch.bfloat16, requires_grad=True)
    white = metric.white(Raw(x_BD))
    assert white.dtype == torch.float32
    assert white.shape == (3, 2, D)
    white.sum().backward()
    assert x_BD.grad is not None


def test_there_are_two_spaces() -> None:
    with pytest.raises(ValueError, match="whitened"):
        fitted(Identity(), sample()).variance("whitened")


def test_nothing_to_whiten() -> None:
    with pytest.raises(RunError, match="all activations are equal"):
        spectrum(torch.zeros(3, 3))
    with pytest.raises(RunError, match="not finite"):
        spectrum(torch.full((3, 3), float("inf")))
