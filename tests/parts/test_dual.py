"""Duals: conformance, the derivation of the ADRC law, and the divergence of the published recursion.

M constraints, T ticks, P problems. Numbers that are compared with a derivation are float64.
"""

import math
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spalf.core.slots import label
from spalf.core.values import Signal
from spalf.errors import ComponentError
from spalf.parts import dual as module
from spalf.parts.dual import Adrc, AdrcLiteral, Ascent, NuPi, Pi
from spalf.parts.filter import DualRateEma, Identity
from spalf.testing import conform, example, signal
from spalf.testing.control import control_plan, drawn, settled
from spalf.testing.dual import against_static_plant
from spalf.testing.problems import Bank, Loop, Problem, bank

DUALS = [cls for cls in vars(module).values() if isinstance(cls, type) and "__spalf__" in vars(cls)]
# A second each: `make check` leaves them to `make test`.
LONG = ("approaches_on_rare_ticks", "releases_and_engages_again")


def checks(dual: type) -> Iterator[Any]:
    for check in conform(dual):
        marks = [pytest.mark.slow] if check.__name__.endswith(LONG) else []
        yield pytest.param(check, id=f"{label(dual).use}-{check.__name__}", marks=marks)


CHECKS = [param for cls in DUALS for param in checks(cls)]
VIOLATIONS = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40)


@pytest.mark.parametrize("check", CHECKS)
def test_conforms(check: Any) -> None:
    check()


def test_all_six_are_here() -> None:
    assert {label(cls).use for cls in DUALS} == {"adrc", "adrc_literal", "adrc_tracking", "pi", "nupi", "ascent"}


# ------------------------------------------------------------------------------------------------ the bank itself
@pytest.mark.parametrize("problem", bank(), ids=lambda p: p.name)
def test_bank_satisfies_kkt(problem: Problem) -> None:
    lam_M = problem.multipliers()
    x_N = problem.point(lam_M)
    slack_M = problem.b_M - problem.J_MN @ x_N
    assert torch.allclose(problem.h_N * x_N + problem.c_N + problem.J_MN.T @ lam_M, torch.zeros_like(x_N), atol=1e-12)
    assert float(slack_M.min()) > -1e-12
    assert float(lam_M.min()) >= -1e-12
    assert float((lam_M * slack_M).abs().max()) < 1e-12


def test_bank_has_the_documented_multipliers() -> None:
    found = {p.name: [round(v, 9) for v in p.multipliers().tolist()] for p in bank()}
    assert found == {
        "scalar": [2.0],
        "coupled": [1.2, 0.8, 0.0],
        "slack": [0.0, 0.0],
        "box": [0.2, 5.0, 1.0],
        "scaled": [1.0, 2.0],
        "parallel": [1.0, 0.0],
    }


def test_contradicting_constraints_have_no_multipliers() -> None:
    one = torch.ones(1, dtype=torch.float64)
    both = Problem(
        name="none", h_N=one, c_N=0 * one, J_MN=torch.tensor([[1.0], [-1.0]]).double(), b_M=-torch.ones(2).double()
    )
    with pytest.raises(ValueError, match="contradict"):
        both.multipliers()


# ------------------------------------------------------------------------------------------------------ every law
@pytest.mark.parametrize("cls", DUALS, ids=lambda c: label(c).use)
@given(v_T=VIOLATIONS, rho=st.floats(0.01, 100.0))
def test_multipliers_stay_in_bounds(cls: type, v_T: list[float], rho: float) -> None:
    dual = settled(example(cls), every=1)
    state, before = dual.init(1), v_T[0]
    for v in v_T:
        state = dual.step(state, signal([v], previous=[before], rho=[rho]))
        before = v
        assert 0.0 <= float(state.lam_M) <= dual.limit


@pytest.mark.parametrize("cls", DUALS, ids=lambda c: label(c).use)
def test_off_constraints_keep_their_state(cls: type) -> None:
    dual = settled(example(cls), every=1)
    before = dual.step(dual.init(2), signal([1.0, 1.0], previous=[0.5, 0.5]))
    after = dual.step(before, signal([2.0, 2.0], previous=[1.0, 1.0], on=[True, False]))
    for name in (a.name for a in attrs.fields(type(before))):
        assert torch.equal(getattr(before, name)[1], getattr(after, name)[1]), name
    assert not torch.equal(before.lam_M[0], after.lam_M[0])


@pytest.mark.parametrize("cls", [c for c in DUALS if c is not AdrcLiteral], ids=lambda c: label(c).use)
def test_out_of_reach_ends_at_the_limit(cls: type) -> None:
    dual = settled(attrs.evolve(example(cls), limit=7.0), every=1)
    state = dual.init(1)
    for _ in range(2000):
        state = dual.step(state, signal([1.0]))
    assert float(state.lam_M) == 7.0


RARE = [(Pi(), 24_000), (NuPi(), 24_000), (Ascent(), 16_000), (Adrc(memory=25.0, delay=0.0), 16_000)]


@pytest.mark.slow
@pytest.mark.parametrize(("dual", "steps"), RARE, ids=lambda x: label(type(x)).use if not isinstance(x, int) else "")
def test_default_gains_settle_on_a_clock_of_100(dual: Any, steps: int) -> None:
    problems, filter = Bank.of(bank()), DualRateEma(every=100)
    trace = Loop(bank=problems, filter=filter).run(settled(dual, every=100), steps)
    assert float(trace.error_T(problems.lam_PM)[-5:].max()) < 1e-3


def test_nupi_with_zero_memory_is_pi() -> None:
    v_TM, rho_M = drawn(0, 50, 8), torch.ones(8)
    nupi, pi = NuPi(nu=0.0), Pi()
    a, b, before_M = nupi.init(8), pi.init(8), v_TM[0]
    for v_M in v_TM:
        seen = signal(v_M, previous=before_M, rho=rho_M)
        a, b, before_M = nupi.step(a, seen), pi.step(b, seen), v_M
    assert torch.allclose(a.lam_M, b.lam_M, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ adrc
def settled_adrc(w: float, k: float, phi: float, gain: float = 1.0) -> Adrc:
    return Adrc(observer=w, bandwidth=k, memory=-1.0 / math.log(phi), every=1, gain=gain, limit=1e12)


def double_signal(v_M: Tensor, before_M: Tensor) -> Signal:
    on_M = torch.ones_like(v_M, dtype=torch.bool)
    one = torch.ones((), dtype=torch.float64)
    return Signal(g_M=v_M, fast_M=v_M, slow_M=v_M, previous_M=before_M, on_M=on_M, rho_M=one)


@pytest.mark.parametrize(("w", "k", "phi"), [(0.3, 0.1, 0.9), (0.05, 0.05, 0.96), (0.46, 0.63, 0.37), (1.0, 1.0, 0.01)])
def test_velocity_form_is_the_position_form(w: float, k: float, phi: float) -> None:
    """The observer eliminated: equal with the anti-windup reset of xi, at the boundary too."""
    m, law = 16, settled_adrc(w, k, phi)
    b0 = (1 - phi) / 2
    v_TM = drawn(3, 2000, m).double() * 0.3 - 0.3 + torch.sin(torch.arange(2000.0).double() / 20)[:, None]
    state = attrs.evolve(law.init(m), lam_M=torch.zeros(m, dtype=torch.float64))
    before_M = v_TM[0]
    # the observer after a step at lam = 0
    xi_M = (1 - w) * -(w + phi - 1 + k) * before_M + w * (1 - w - phi) * before_M
    clipped = 0
    for v_M in v_TM:
        state = law.step(state, double_signal(v_M, before_M))
        before_M = v_M
        lam_M = ((xi_M + w * v_M + (phi - 1 + k) * v_M) / b0).clamp(min=0)
        clipped += int((lam_M == 0).sum())
        reset_M = b0 * lam_M - (w + phi - 1 + k) * v_M
        assert torch.allclose(state.disturbance_M, reset_M + w * v_M, atol=1e-9)
        xi_M = (1 - w) * reset_M + w * (1 - w - phi) * v_M + w * b0 * lam_M
        assert torch.allclose(state.lam_M, lam_M, atol=1e-8)
    assert 500 < clipped < 2000 * m - 500, "the comparison has to visit both the interior and the boundary"


def loop_matrix(phi: Tensor, b: Tensor, k_p: Tensor, k_i: Tensor) -> Tensor:
    """(v, lam) -> (v', lam') of v' = phi v - b lam, lam' = lam + K_P (v' - v) + K_I v'; [..., 2, 2]."""
    both = k_p + k_i
    return torch.stack([torch.stack([phi, -b], -1), torch.stack([both * phi - k_p, 1 - both * b], -1)], -2)


def test_exact_model_places_the_eigenvalues() -> None:
    draw = torch.rand(2000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.98 + 0.01
    w, k, phi, rho = draw.unbind(1)
    for i in range(0, 2000, 100):
        law = settled_adrc(float(w[i]), float(k[i]), float(phi[i]))
        assert law.gains() == pytest.approx((float(phi[i] - (1 - w[i]) * (1 - k[i])), float(w[i] * k[i])))
    b0 = (1 - phi) / (2 * rho)
    found = torch.linalg.eigvals(loop_matrix(phi, b0, (phi - (1 - w) * (1 - k)) / b0, w * k / b0))
    wanted = torch.stack([torch.minimum(1 - w, 1 - k), torch.maximum(1 - w, 1 - k)], 1)
    assert torch.allclose(found.real.sort(1).values, wanted, atol=1e-6)
    assert torch.allclose(found.imag, torch.zeros_like(found.imag), atol=1e-6)


def test_jury_region_is_the_unit_disc() -> None:
    draw = torch.rand(100_000, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w, k, model, phi = draw[:, :4].unbind(1)
    beta = (draw[:, 4] * 8 - 4).exp()
    k_p, k_i = model - (1 - w) * (1 - k), w * k
    stable = (k_i > 0) & (beta * (2 * k_p + k_i) < 2 * (1 + phi)) & (beta * k_p > -(1 - phi))
    radius = torch.linalg.eigvals(loop_matrix(phi, beta, k_p, k_i)).abs().amax(1)
    clear = (radius - 1).abs() > 1e-9
    assert bool((stable == (radius < 1))[clear].all())
    assert 0.1 < float(stable.double().mean()) < 0.9


def test_gain_bound_holds_for_coupled_constraints() -> None:
    """A settled primal answers v = const - s lam; s 2P has its eigenvalues in (0, 1), so b0 = 1 / (2 rho) is safe."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(200):
        J = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        H = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        H = H @ H.T + 0.05 * torch.eye(6, dtype=torch.float64)
        rho = torch.randn(3, generator=generator, dtype=torch.float64).exp()
        Q = J @ torch.linalg.solve(H, J.T)
        s = torch.linalg.inv(torch.linalg.inv(Q) + 2 * torch.diag(rho))
        modes = torch.linalg.eigvals(s @ (2 * torch.diag(rho)))
        assert float(modes.real.min()) > 0
        assert float(modes.real.max()) < 1
        # the primal itself, solved: (H + J' 2P J) x = -c - J'(lam - 2 P b), so g moves by -J (...)^-1 J' lam
        lam = torch.randn(3, generator=generator, dtype=torch.float64)
        moved = -J @ torch.linalg.solve(H + J.T @ (2 * rho[:, None] * J), J.T @ lam)
        assert torch.allclose(moved, -s @ lam, atol=1e-8)


def test_gain_follows_the_penalty() -> None:
    law = settled_adrc(0.3, 0.2, 0.8)
    lam_M = law.step(law.init(3), signal([0.1] * 3, previous=[0.05] * 3, rho=[0.5, 1.0, 2.0])).lam_M
    assert torch.allclose(lam_M / lam_M[1], torch.tensor([0.5, 1.0, 2.0]))


def test_limit_of_no_memory_is_the_method_of_multipliers() -> None:
    law = Adrc(observer=1.0, bandwidth=1.0, memory=1.0, every=1000)
    lam_M = law.step(
        attrs.evolve(law.init(1), lam_M=torch.tensor([0.7])), signal([0.3], previous=[5.0], rho=[1.5])
    ).lam_M
    assert torch.allclose(lam_M, torch.tensor([0.7 + 2 * 1.5 * 0.3]))


def test_margin_moves_the_set_point() -> None:
    """On the plant v = 1 - lam / 20 a law with margin m settles at v = -m, lam = 20 (1 + m)."""
    law = attrs.evolve(settled_adrc(0.3, 0.2, 0.8), margin=0.1)
    state, v = law.init(1), 1.0
    for _ in range(400):
        previous, v = v, 1.0 - float(state.lam_M) / 20
        state = law.step(state, signal([v], previous=[previous]))
    assert float(state.lam_M) == pytest.approx(22.0, abs=1e-2)
    assert v == pytest.approx(-0.1, abs=1e-3)


def test_gain_rule() -> None:
    law = Adrc(delay=0.0).settle(control_plan(DualRateEma(every=100)))
    assert law.observer == pytest.approx(0.5 / 1.09)
    assert law.memory == 200.0
    assert law.bandwidth == pytest.approx(max(0.5 / 1.09, 1 - math.exp(-0.5)))
    assert Adrc(delay=0.0).settle(control_plan(Identity(every=1))).observer == 0.5
    assert Adrc().settle(control_plan(DualRateEma(every=500))).memory == 500.0
    given_w = Adrc(observer=0.2).settle(control_plan(DualRateEma()))
    assert given_w.observer == 0.2
    rows = {row.path: row for row in given_w.derive(control_plan(DualRateEma()))}
    assert rows["dual.observer"].formula == "given"
    assert rows["dual.bandwidth"].formula.startswith("max(observer")
    assert settled(law, every=100) == law


def test_default_dead_time_frees_the_gain_from_the_clock() -> None:
    per_step = []
    for every in (1, 10, 100):
        rows = {row.path: row.value for row in Adrc().derive(control_plan(DualRateEma(every=every)))}
        k_i = rows["dual.K_I"]
        assert k_i is not None
        per_step.append(k_i / every)
    assert max(per_step) < 2 * min(per_step)


def test_unsettled_law_says_what_to_do() -> None:
    with pytest.raises(ComponentError, match="settle"):
        Adrc().init(1)


@pytest.mark.slow
@pytest.mark.parametrize(("every", "steps"), [(1, 5000), (100, 9000)])
def test_rule_settles_under_a_dead_time_of_100_steps(every: int, steps: int) -> None:
    # without the two problems that have a mode of s below 0.1, which need 12 000 and 25 000 steps
    problems = Bank.of([p for p in bank() if p.name not in ("coupled", "scaled")])
    loop = Loop(bank=problems, filter=DualRateEma(every=every), delay_P=torch.full((len(problems.problems),), 100))
    trace = loop.run(settled(Adrc(memory=25.0, delay=100.0), every), steps)
    assert float(trace.error_T(problems.lam_PM)[-1]) < 1e-3
    overshoot_PM = trace.lam_TPM.amax(0) - problems.lam_PM
    assert float(overshoot_PM.max()) < 0.05 * float(problems.lam_PM.max())


def test_dead_time_must_enter_the_rule() -> None:
    """Gains made for no delay, under a delay of 100 steps, never settle."""
    problems = Bank.of(bank())
    loop = Loop(bank=problems, filter=DualRateEma(every=1), delay_P=torch.full((len(problems.problems),), 100))
    trace = loop.run(settled(Adrc(memory=25.0, delay=0.0), every=1), 3000)
    assert float(trace.error_T(problems.lam_PM)[-500:].max()) > 1.0


def test_bank_is_met_at_its_multipliers_under_noise() -> None:
    """Noise of sd 0.1 on the measurements moves no multiplier's mean by 5 % of the largest one."""
    problems, copies = Bank.of(bank(), copies=8), 8
    noise = drawn(5, 1009, *problems.b_PM.shape, spread=0.1).double()
    law = settled(Adrc(memory=25.0, delay=0.0), every=1)
    trace = Loop(bank=problems, filter=DualRateEma(every=1), noise=lambda t: noise[t % 1009]).run(law, 6000)
    mean_PM = trace.lam_TPM[2000:].mean(0).view(copies, len(bank()), -1).mean(0)
    truth_PM = problems.lam_PM[: len(bank())]
    binding = truth_PM > 0
    scale_PM = truth_PM.amax(1, keepdim=True).clamp(min=1).expand_as(truth_PM)
    assert bool((((mean_PM - truth_PM).abs() / scale_PM)[binding] < 0.05).all())


@pytest.mark.slow
@pytest.mark.parametrize("cls", DUALS, ids=lambda c: label(c).use)
def test_finite_under_noise_for_1e5_ticks(cls: type) -> None:
    dual = settled(example(cls), every=100)
    lam_TM = against_static_plant(dual, 100_000, drawn(0, 9973, 4, spread=0.1), clipped=True)
    assert bool(lam_TM.isfinite().all())
    assert float(lam_TM.max()) <= dual.limit


# -------------------------------------------------------------------------------------------- the published recursion
def literal_eigenvalue(w: float) -> float:
    return 1 + (-w + math.sqrt(w * w + 4 * w)) / 2


@pytest.mark.known_to_diverge
@pytest.mark.parametrize("w", [0.01, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_published_recursion_has_an_eigenvalue_above_one(w: float) -> None:
    matrix = torch.tensor([[1 - w, -w], [-1.0, 1.0]], dtype=torch.float64)
    largest = float(torch.linalg.eigvals(matrix).real.max())
    assert largest == pytest.approx(literal_eigenvalue(w))
    assert largest > 1
    # and the component does grow by that factor, with nothing to correct: v = 0
    law = AdrcLiteral(observer=w, limit=1e300)
    state = attrs.evolve(
        law.init(1), lam_M=torch.ones(1, dtype=torch.float64), xi_M=torch.zeros(1, dtype=torch.float64)
    )
    nothing = double_signal(torch.zeros(1).double(), torch.zeros(1).double())
    lam = [1.0]
    for _ in range(200):
        state = law.step(state, nothing)
        lam.append(float(state.lam_M))
    assert lam[-1] / lam[-2] == pytest.approx(literal_eigenvalue(w), rel=1e-6)


@pytest.mark.known_to_diverge
@pytest.mark.parametrize("w", [0.01, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_published_recursion_diverges_on_a_scalar_problem(w: float) -> None:
    """min (x - 2)^2 subject to x <= 1: |lam| passes 1e6 within 400 steps, where lam* = 2."""
    problems = Bank.of(bank()[:1])
    lam_T = Loop(bank=problems, filter=DualRateEma(every=1)).run(AdrcLiteral(observer=w, limit=1e30), 400).lam_TPM
    assert float(lam_T.max()) > 1e6
    clipped_T = Loop(bank=problems, filter=DualRateEma(every=1)).run(AdrcLiteral(observer=w), 400).lam_TPM
    assert float(clipped_T[-1].max()) == 1e4


def test_published_gains_without_the_second_subtraction_are_pi() -> None:
    """2w (v - v_previous) + w^2 v_previous is already the whole law of phi = 1, k = w, b0 = 1."""
    w, v, before = 0.3, torch.tensor(0.7).double(), torch.tensor(0.4).double()
    k_p, k_i = 1 - (1 - w) ** 2, w**2
    assert torch.allclose(2 * w * (v - before) + w**2 * before, k_p * (v - before) + k_i * v)
