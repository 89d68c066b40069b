"""What every dual must do. M constraints, T ticks, P problems of the bank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spalf.core import tree
from spalf.parts.filter import DualRateEma
from spalf.testing import Check, signal
from spalf.testing.control import drawn, is_pure, settled
from spalf.testing.problems import Bank, Loop, bank

STEPS = 5000
"""Primal steps in which a dual must have settled on the bank, on a clock of one step."""


def dual_checks(dual: Any) -> list[Check]:
    """The checks of one dual; where it is `known_to_diverge`, that it fails to settle is one of them."""
    always = _algebra(settled(dual, every=1)) + _robust(settled(dual, every=1))
    settles = _settles(dual)
    if getattr(dual, "known_to_diverge", False):
        return always + [_must_fail(check) for check in settles]
    return always + settles + _boundary(settled(dual, every=1), dual)


def _must_fail(check: Check) -> Check:
    def inverted() -> None:
        try:
            check()
        except AssertionError:
            return
        raise AssertionError(f"{check.__name__} holds, though the dual is marked as known to diverge")

    inverted.__name__ = f"fails_{check.__name__}"
    return inverted


def against_static_plant(dual: Any, ticks: int, noise_TM: Tensor, clipped: bool = False) -> Tensor:
    """Multipliers [T, M] when each violation answers at once, v = 1 - lam + noise; `clipped`: every second to +-.15."""
    m = noise_TM.shape[1]
    limit_M = torch.tensor([torch.inf, 0.15 if clipped else torch.inf]).repeat(m // 2)
    state, before_M = dual.init(m), torch.ones(m)
    out = []
    for t in range(ticks):
        v_M = (1.0 - state.lam_M + noise_TM[t % len(noise_TM)]).clamp(-limit_M, limit_M)
        state = dual.step(state, signal(v_M, previous=before_M))
        before_M = v_M
        out.append(state.lam_M)
    return torch.stack(out)


def _held(dual: Any, v_T: Tensor) -> Tensor:
    """Multipliers [T] under violations that do not answer."""
    state, before = dual.init(1), v_T[0]
    out = []
    for v in v_T:
        state = dual.step(state, signal(v[None], previous=before[None]))
        before = v
        out.append(state.lam_M)
    return torch.stack(out)[:, 0]


def _algebra(dual: Any) -> list[Check]:
    m = 64

    def run(order: Tensor) -> Any:
        state, before_M = dual.init(m), drawn(0, m)[order]
        for t in range(200):
            # violations over eight decades; a third of the constraints is off at any time
            v_M = (drawn(2 * t, m) * torch.logspace(-6, 2, m))[order]
            on_M = (drawn(2 * t + 1, m) > -0.4)[order]
            new = dual.step(state, signal(v_M, previous=before_M, on=on_M, rho=(drawn(1, m).exp())[order]))
            state, before_M = tree.where(on_M, new, state), v_M
            assert bool((state.lam_M >= 0).all()), "a multiplier is negative"
            assert bool(state.lam_M.isfinite().all()), "a multiplier is not finite"
        return state

    def starts_without_multipliers() -> None:
        assert torch.equal(dual.init(m).lam_M, torch.zeros(m))

    def never_negative() -> None:
        run(torch.arange(m))

    def permuting_constraints_permutes_multipliers() -> None:
        order = torch.randperm(m, generator=torch.Generator().manual_seed(0))
        assert torch.equal(run(torch.arange(m)).lam_M[order], run(order).lam_M)

    def pure() -> None:
        state = dual.step(dual.init(m), signal(drawn(0, m)))
        assert is_pure(state, lambda s: dual.step(s, signal(drawn(1, m), previous=drawn(0, m))))

    def can_be_saved() -> None:
        state = dual.step(dual.init(m), signal(drawn(0, m)))
        flat = {k: v.clone() if isinstance(v, Tensor) else v for k, v in tree.flatten(state).items()}
        again = tree.restore(dual.init(m), flat)
        seen = signal(drawn(1, m), previous=drawn(0, m))
        assert torch.equal(dual.step(again, seen).lam_M, dual.step(state, seen).lam_M)

    return [
        starts_without_multipliers,
        never_negative,
        permuting_constraints_permutes_multipliers,
        pure,
        can_be_saved,
    ]


def _robust(dual: Any) -> list[Check]:
    def finite_under_noise() -> None:
        # 64 constraints for 4000 ticks are 2.5 x 10^5 steps of one, in a fraction of their time.
        lam_TM = against_static_plant(dual, 4000, drawn(0, 997, 64, spread=0.1), clipped=True)
        assert bool(lam_TM.isfinite().all())
        assert bool((lam_TM >= 0).all())

    def finite_under_delay() -> None:
        problems = Bank.of(bank())
        loop = Loop(bank=problems, filter=DualRateEma(every=1), delay_P=torch.full((len(problems.problems),), 100))
        assert bool(loop.run(dual, 2000).lam_TPM.isfinite().all())

    def finite_where_infeasible() -> None:
        assert bool(_held(dual, torch.ones(3000)).isfinite().all())

    return [finite_under_noise, finite_under_delay, finite_where_infeasible]


def _settles(dual: Any) -> list[Check]:
    def settles_on_a_static_plant() -> None:
        # a primal that answers at once is what a clock of rare ticks sees
        lam_TM = against_static_plant(settled(dual, every=100), 2000, torch.zeros(1, 8))
        assert bool(((lam_TM[-100:] - 1.0).abs() < 1e-3).all()), f"lam ends at {lam_TM[-1, 0]:.4g}, not at 1"

    def settles_on_the_bank() -> None:
        problems = Bank.of(bank())
        trace = Loop(bank=problems, filter=DualRateEma(every=1)).run(settled(dual, every=1), STEPS)
        worst = float(trace.error_T(problems.lam_PM)[-100:].max())
        assert worst < 1e-3, f"the worst multiplier is {worst:.3g} off"

    def approaches_on_rare_ticks() -> None:
        problems = Bank.of(bank())
        trace = Loop(bank=problems, filter=DualRateEma(every=100)).run(settled(dual, every=100), 12_000)
        error_P = (trace.lam_TPM[-1] - problems.lam_PM).abs().amax(1)
        assert bool((error_P <= 0.5 * problems.lam_PM.amax(1)).all()), f"errors {error_P.tolist()}"

    return [settles_on_a_static_plant, settles_on_the_bank, approaches_on_rare_ticks]


def _boundary(dual: Any, given: Any) -> list[Check]:
    def releases_a_satisfied_constraint() -> None:
        lam_T = _held(dual, torch.cat([torch.ones(50), -torch.ones(1000)]))
        assert float(lam_T[49]) > 0.0, "a violated constraint has no multiplier"
        assert float(lam_T[-1]) == 0.0

    def releases_and_engages_again() -> None:
        problems, span = Bank.of(bank()), 2000

        def shift(step: int) -> float:
            return 3.0 if span <= step < 2 * span else 0.0

        lam_TPM = Loop(bank=problems, filter=DualRateEma(every=1), shift=shift).run(dual, 3 * span).lam_TPM
        scale_P1 = problems.lam_PM.amax(1, keepdim=True).clamp(min=1.0)
        wrong_T = ((lam_TPM - problems.lam_PM).abs() / scale_P1 > 0.05).flatten(1).any(1)
        first, again = (_last(wrong_T[a : a + span]) for a in (0, 2 * span))
        assert bool((lam_TPM[2 * span - 1] == 0).all()), "loosened constraints keep their multipliers"
        assert again <= 2 * first, f"settles in {first} steps, after a release in {again}"

    def inactive_constraints_end_at_zero() -> None:
        problems = Bank.of(bank())
        lam_PM = Loop(bank=problems, filter=DualRateEma(every=1)).run(dual, STEPS).lam_TPM[-1]
        assert bool((lam_PM[problems.lam_PM < 1e-9] == 0).all())

    def noise_moves_no_mean() -> None:
        noisy = against_static_plant(settled(given, every=100), 4000, drawn(0, 997, 64, spread=0.1))
        assert abs(float(noisy[1000:].mean()) - 1.0) < 0.05

    def grows_at_most_linearly_where_infeasible() -> None:
        growth_T = _held(dual, torch.ones(3000)).diff()
        assert float(growth_T[1500:].max()) <= 1.001 * float(growth_T[:1500].max())

    return [
        releases_a_satisfied_constraint,
        releases_and_engages_again,
        inactive_constraints_end_at_zero,
        noise_moves_no_mean,
        grows_at_most_linearly_where_infeasible,
    ]


def _last(wrong_T: Tensor) -> int:
    """Ticks until the last wrong one."""
    at = wrong_T.nonzero()
    return int(at[-1]) + 1 if len(at) else 0
