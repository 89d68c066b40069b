"""Conformance of whiteners and strata: what every one of them must do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from spalf.core.built import Metric, Stream
from spalf.core.slots import label
from spalf.core.values import Facts, Raw, White
from spalf.errors import RunError

Check = Callable[[], None]

D, V, F = 12, 40, 96
FACTS = Facts(d_model=D, n_vocab=V, provides=frozenset({"activations", "unembedding", "tokens"}))
LARGEST_CONDITION = 1e4
"""Of W: what float32 can invert with three digits to spare."""


def checks(cls: type, component: Any) -> list[Check]:
    """The checks of the slot that `cls` is labelled with."""
    return [bind(test, component) for test in {"whitener": WHITENER, "stratum": STRATUM}[label(cls).slot]]


def bind(test: Callable[[Any], None], component: Any) -> Check:
    """A check of one component, under the test's name."""

    def check() -> None:
        test(component)

    check.__name__ = test.__name__
    return check


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------- whitener
def sample(n: int = 4096, flat: int = 1, spread: float = 100.0) -> Tensor:
    """Rows [n, D] with standard deviations from `spread` down to 1, `flat` directions without variance, mean 50."""
    draw = _generator()
    basis_DD = torch.linalg.qr(torch.randn(D, D, generator=draw, dtype=torch.float64)).Q
    deviation_D = torch.logspace(0, 1, D, base=spread, dtype=torch.float64)
    deviation_D[:flat] = 0
    x_BD: Tensor = (torch.randn(n, D, generator=draw, dtype=torch.float64) * deviation_D) @ basis_DD + 50.0
    return x_BD


def fitted(component: Any, x_BD: Tensor) -> Metric:
    """A metric fitted to the mean and covariance of `x_BD`."""
    metric: Metric = component.build(FACTS)
    component.fit_(metric, x_BD.double().mean(0), torch.cov(x_BD.double().T, correction=0))
    return metric


def apart(a_BD: Tensor, b_BD: Tensor) -> float:
    """Largest distance between rows, relative to their length."""
    return float(((a_BD - b_BD).norm(dim=1) / b_BD.norm(dim=1)).max())


def raw_undoes_white(component: Any) -> None:
    points_BD = Raw(sample().float())
    metric = fitted(component, sample())
    far = Raw(points_BD * 10)
    for points in (points_BD, far):
        assert apart(metric.raw(metric.white(points)), points) < 1e-3
    v = Raw(points_BD[:8] - points_BD[8:16])
    assert apart(metric.raw_direction(metric.white_direction(v)), v) < 1e-3


def raw_square_is_that_of_raw_rows_and_so_is_its_gradient(component: Any) -> None:
    metric = fitted(component, sample())
    v = White(torch.randn(16, D, generator=torch.Generator().manual_seed(3)).requires_grad_(True))
    wanted = metric.raw_direction(v).square().sum()
    torch.testing.assert_close(metric.raw_square(v), wanted, rtol=1e-4, atol=0)
    (grad,), (right,) = torch.autograd.grad(metric.raw_square(v), v), torch.autograd.grad(wanted, v)
    assert apart(grad, right) < 1e-3


def rough_directions_are_raw_ones_up_to_rounding(component: Any) -> None:
    metric = fitted(component, sample())
    v = White(torch.randn(16, D, generator=torch.Generator().manual_seed(3)))
    right = metric.raw_direction(v)
    assert apart(metric.rough_direction(v), right) < 1e-6
    assert apart(metric.rough_direction(White(v.bfloat16())).float(), right) < 0.02


def directions_are_differences_of_points(component: Any) -> None:
    points_BD = Raw(sample().float())
    metric = fitted(component, sample())
    a, b = points_BD[:50], points_BD[50:100]
    difference = metric.white(Raw(a)) - metric.white(Raw(b))
    assert apart(metric.white_direction(Raw(a - b)), difference) < 1e-3


def both_maps_are_symmetric_and_well_conditioned(component: Any) -> None:
    metric = fitted(component, sample())
    for matrix in (metric.white_direction(Raw(torch.eye(D))), metric.raw_direction(White(torch.eye(D)))):
        torch.testing.assert_close(matrix, matrix.T, rtol=1e-4, atol=float(matrix.abs().max()) * 1e-5)
        assert float(torch.linalg.cond(matrix.double())) < LARGEST_CONDITION


def white_is_centred_and_no_more_spread_than_raw(component: Any) -> None:
    x = sample(flat=0)
    white = fitted(component, x).white(Raw(x.float())).double()
    if getattr(component, "centred", True):
        assert float(white.mean(0).abs().max()) < 1e-2
    assert float(white.square().mean()) < 1.01
    spread, raw_spread = (float(torch.linalg.cond(torch.cov(y.T))) for y in (white, x))
    assert spread <= raw_spread * 1.01


def variance_is_measured_on_both_sides(component: Any) -> None:
    x_BD = sample()
    metric = fitted(component, x_BD)
    raw = (x_BD - x_BD.mean(0)).square().sum(1).mean()
    white_BD = metric.white(Raw(x_BD.float())).double()
    white = (white_BD - white_BD.mean(0)).square().sum(1).mean()
    torch.testing.assert_close(metric.variance("raw").double(), raw, rtol=1e-4, atol=0)
    torch.testing.assert_close(metric.variance("white").double(), white, rtol=1e-3, atol=0)


def state_pours_into_a_fresh_metric(component: Any) -> None:
    points_BD = Raw(sample().float())
    metric, fresh = fitted(component, sample()), component.build(FACTS)
    fresh.load_state_dict(metric.state_dict())
    assert torch.equal(fresh.white(points_BD), metric.white(points_BD))
    assert torch.equal(fresh.raw(metric.white(points_BD)), metric.raw(metric.white(points_BD)))
    assert torch.equal(fresh.variance("white"), metric.variance("white"))


def refuses_activations_that_do_not_vary(component: Any) -> None:
    for bad in (torch.zeros(D, D), torch.full((D, D), float("nan"))):
        try:
            component.fit_(component.build(FACTS), torch.zeros(D, dtype=torch.float64), bad.double())
        except RunError:
            continue
        raise AssertionError("a covariance that is zero or not finite was accepted")


WHITENER = (
    raw_undoes_white,
    raw_square_is_that_of_raw_rows_and_so_is_its_gradient,
    rough_directions_are_raw_ones_up_to_rounding,
    directions_are_differences_of_points,
    both_maps_are_symmetric_and_well_conditioned,
    white_is_centred_and_no_more_spread_than_raw,
    variance_is_measured_on_both_sides,
    state_pours_into_a_fresh_metric,
    refuses_activations_that_do_not_vary,
)


# -------------------------------------------------------------------------------------------------------- stratum
class Vocabulary:
    """As much of a stream as a stratum asks: an unembedding whose last four rows are padding, and token counts."""

    facts = FACTS

    def unembedding(self) -> Raw:
        rows_VD = torch.randn(V, D, generator=_generator(1)) + 3.0
        rows_VD[-4:] = 0
        return Raw(rows_VD)

    def token_counts(self) -> Tensor:
        return torch.arange(V - 4) * 7 % 31

    def stream(self) -> Stream:
        return cast(Stream, self)


def _soft_metric() -> Metric:
    from spalf.parts.whitener import SoftZca

    return fitted(SoftZca(), sample())


def start(component: Any, seed: int = 0) -> White:
    """First rows, on the kit's vocabulary and a soft-ZCA metric."""
    rows = component.rows(FACTS, F, F)
    anchor = component.anchor(Vocabulary().stream(), rows)
    begun: White = component.start(rows, _soft_metric(), anchor, _generator(seed))
    return begun


def rows_are_within_bounds(component: Any) -> None:
    for width in (F, 4 * F):
        rows = component.rows(FACTS, width, width)
        assert 0 <= rows <= width
        assert rows == component.rows(FACTS, width, width)


def anchors_are_unit_rows_with_ids(component: Any) -> None:
    rows = component.rows(FACTS, F, F)
    anchor = component.anchor(Vocabulary().stream(), rows)
    if anchor is None:
        return
    assert anchor.directions_AD.shape == (rows, D)
    assert anchor.ids_A.shape == (rows,)
    assert len(set(anchor.ids_A.tolist())) == rows
    torch.testing.assert_close(anchor.directions_AD.norm(dim=1), torch.ones(rows), rtol=0, atol=1e-6)


def starts_with_finite_unit_rows(component: Any) -> None:
    rows = component.rows(FACTS, F, F)
    assert start(component).shape == (rows, D)
    torch.testing.assert_close(start(component).norm(dim=1), torch.ones(rows), rtol=0, atol=1e-6)


def start_is_a_function_of_the_draw(component: Any) -> None:
    assert torch.equal(start(component, 3), start(component, 3))


def projecting_the_start_changes_nothing(component: Any) -> None:
    after = start(component).clone()
    component.project_(after)
    torch.testing.assert_close(after, start(component), rtol=0, atol=1e-6)


def projecting_twice_is_projecting_once(component: Any) -> None:
    rows = component.rows(FACTS, F, F)
    once = torch.randn(rows, D, generator=_generator(2)) * 5
    once[0] = 0
    component.project_(once)
    twice = once.clone()
    component.project_(twice)
    assert bool(torch.isfinite(once).all())
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=1e-6)


def gradients_are_projected_in_place_and_once(component: Any) -> None:
    rows = component.rows(FACTS, F, F)
    weight, grad = start(component).clone(), torch.randn(rows, D, generator=_generator(4))
    once = grad.clone()
    component.project_gradient_(weight, once)
    twice = once.clone()
    component.project_gradient_(weight, twice)
    assert torch.equal(weight, start(component))
    assert bool((once.norm(dim=1) <= grad.norm(dim=1) * (1 + 1e-5)).all())
    torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-5)


STRATUM = (
    rows_are_within_bounds,
    anchors_are_unit_rows_with_ids,
    starts_with_finite_unit_rows,
    start_is_a_function_of_the_draw,
    projecting_the_start_changes_nothing,
    projecting_twice_is_projecting_once,
    gradients_are_projected_in_place_and_once,
)
