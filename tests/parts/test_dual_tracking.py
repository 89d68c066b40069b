"""`adrc_tracking`: its gains are those of `adrc`, its integral is bounded, and a bias is told from noise."""

from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from spalf.errors import ComponentError
from spalf.parts.dual import Adrc, AdrcTracking
from spalf.parts.filter import DualRateEma, Identity
from spalf.testing import signal
from spalf.testing.control import control_plan, drawn


def plain(observer: float = 0.1, **options: Any) -> AdrcTracking:
    """The law on a clock of ten steps, without what tracks."""
    given: dict[str, Any] = {"observer": observer, "every": 10, "boost": 1.0, **options}
    return AdrcTracking(**given)


def driven(law: AdrcTracking, v_TM: Tensor) -> Tensor:
    """Multipliers [T, M] under violations that do not answer; M equal to that of `v_TM`."""
    state, previous_M = law.init(v_TM.shape[1]), v_TM[0]
    out = []
    for v_M in v_TM:
        state, previous_M = law.step(state, signal(v_M, previous=previous_M)), v_M
        out.append(state.lam_M)
    return torch.stack(out)


@pytest.mark.parametrize(("observer", "memory"), [(0.1, 12.0), (0.05, 50.0), (0.4, 5.0)])
def test_is_adrc_with_the_plants_own_bandwidth(observer: float, memory: float) -> None:
    tracking = plain(observer, memory=memory, reach=1e9)
    adrc = Adrc(observer=observer, memory=memory, every=10, bandwidth=1.0)
    adrc = attrs.evolve(adrc, bandwidth=1.0 - adrc.phi)
    one, other = tracking.init(8), adrc.init(8)
    before_M = drawn(0, 8)
    for t in range(1, 50):
        v_M = drawn(t, 8)
        seen = signal(v_M, previous=before_M, rho=[0.5] * 4 + [2.0] * 4)
        one, other, before_M = tracking.step(one, seen), adrc.step(other, seen), v_M
        assert torch.allclose(one.lam_M, other.lam_M, rtol=1e-4, atol=1e-5)


def test_far_violations_count_as_reach() -> None:
    lam_TM = driven(plain(reach=0.2), torch.tensor([0.1, 0.2, 5.0]).expand(20, 3))
    assert torch.equal(lam_TM[:, 1], lam_TM[:, 2])
    assert torch.allclose(lam_TM[-1], 20 * 2 * 0.1 * torch.tensor([0.1, 0.2, 0.2]), rtol=1e-5)


def test_a_bias_is_tracked_and_noise_is_not() -> None:
    law, start = plain(boost=8.0), torch.full((1, 64), 0.02)
    bias_TM = start.expand(200, 64)
    noise_TM = 0.02 * drawn(1, 200, 64)
    growth = driven(law, bias_TM)[-1] - driven(law, bias_TM)[-2]
    assert torch.allclose(growth, torch.full((64,), 8 * 2 * 0.1 * 0.02), rtol=1e-2)
    # on noise the gain stays near its base: |mean| / mean size over 20 ticks is about a quarter
    state, gains = law.init(64), []
    for v_M in noise_TM:
        state = law.step(state, signal(v_M, previous=v_M))
        gains.append(1 + 7 * (state.bias_M.abs() / state.size_M).clamp(max=1.0) ** 4)
    assert float(torch.stack(gains)[100:].mean()) < 1.5


def test_far_from_the_budget_nothing_is_tracked() -> None:
    law = plain(boost=8.0, reach=1e9)
    far = driven(law, torch.full((100, 1), 0.3))
    assert float(far[-1] - far[-2]) == pytest.approx(2 * 0.1 * 0.3, rel=1e-4)


def test_the_observers_gain_is_at_most_one() -> None:
    lam_TM = driven(plain(0.5, boost=8.0), torch.full((200, 1), 0.01))
    assert float(lam_TM[-1] - lam_TM[-2]) == pytest.approx(2 * 0.01, rel=1e-3)


def test_margin_moves_the_set_point() -> None:
    law = plain(margin=0.1)
    lam_TM = driven(law, torch.tensor([[0.5]] * 5 + [[-0.1]] * 5))
    assert torch.allclose(lam_TM[5:].diff(dim=0), torch.zeros(4, 1), atol=1e-6)


@pytest.mark.parametrize(("every", "observer"), [(1, 0.0125), (10, 0.5 / 4.9), (100, 0.5 / 1.39)])
def test_rule(every: int, observer: float) -> None:
    settled = AdrcTracking().settle(control_plan(DualRateEma(every=every)))
    assert settled.observer == pytest.approx(observer)
    rows = {row.path: row for row in AdrcTracking().derive(control_plan(DualRateEma(every=every)))}
    assert rows["dual.K_I"].value == pytest.approx(2 * observer)
    assert rows["dual.observer"].origin == "gain rule"


def test_given_observer_says_so() -> None:
    rows = {row.path: row for row in AdrcTracking(observer=0.3).derive(control_plan(Identity()))}
    assert rows["dual.observer"].formula == "given"
    assert rows["dual.observer"].value == 0.3


def test_unsettled_law_says_what_to_do() -> None:
    with pytest.raises(ComponentError, match="settle"):
        AdrcTracking().init(1)
    with pytest.raises(ValueError, match=r"filter\.every"):
        AdrcTracking(every=7).settle(control_plan(DualRateEma()))
