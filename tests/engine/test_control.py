"""The control step: ticks, masks, holds; pure, without a host copy, and resumable. M constraints."""

from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

from spalf.core import tree
from spalf.core.slots import dual
from spalf.core.state import ControlState
from spalf.core.values import Clock, Signal, Violations
from spalf.engine import control
from spalf.parts.dual import Adrc, LamState, Pi
from spalf.parts.filter import DualRateEma
from spalf.parts.gate import Feasible
from spalf.parts.lagrangian import AlCole
from spalf.parts.penalty import Capu, Constant
from spalf.testing.control import copied, drawn, same, settled

M = 3
FILTER, DUAL, PENALTY = DualRateEma(every=5), Pi(), Capu(every=1)
ALL = torch.ones(M, dtype=torch.bool)


def entered(mask_M: Tensor = ALL, g: float = 0.5) -> ControlState:
    start = control.init(FILTER, DUAL, PENALTY, M)
    return control.enter(FILTER, PENALTY, start, mask_M, torch.tensor([2.0, 3.0, 4.0]), torch.full((M,), g))


def advance(state: ControlState, first: int, last: int, g: float = 0.5, hold: tuple[str, ...] = ()) -> ControlState:
    for t in range(first, last):
        state, _ = control.step(FILTER, DUAL, PENALTY, state, torch.full((M,), g), Clock(step=t, total=100), hold)
    return state


def test_all_is_off_at_first() -> None:
    start = control.init(FILTER, DUAL, PENALTY, M)
    assert not bool(start.on_M.any())
    assert torch.equal(start.lam_M, torch.zeros(M))
    assert torch.equal(start.budget_M, torch.ones(M))
    assert same(advance(start, 0, 20).dual, start.dual)


def test_entering_sets_budget_filter_and_mask_of_its_rows_only() -> None:
    first = entered(torch.tensor([True, False, False]))
    assert first.budget_M.tolist() == [2.0, 1.0, 1.0]
    assert first.on_M.tolist() == [True, False, False]
    assert first.filter.fast_M.tolist() == [0.5, 0.0, 0.0]
    moved = advance(first, 0, 20)
    both = control.enter(
        FILTER, PENALTY, moved, torch.tensor([False, True, False]), torch.full((M,), 9.0), torch.full((M,), -7.0)
    )
    assert both.budget_M.tolist() == [2.0, 9.0, 1.0]
    assert both.on_M.tolist() == [True, True, False]
    assert both.filter.fast_M.tolist() == [moved.filter.fast_M[0].item(), -7.0, 0.0]
    assert torch.equal(both.lam_M, moved.lam_M)
    assert torch.equal(both.rho_M[0], moved.rho_M[0])


def test_entering_reads_no_other_row() -> None:
    nan = torch.tensor([1.0, torch.nan, torch.nan])
    state = control.enter(
        FILTER, PENALTY, control.init(FILTER, DUAL, PENALTY, M), torch.tensor([True, False, False]), nan, nan
    )
    assert all(bool(v.isfinite().all()) for v in tree.flatten(state).values() if isinstance(v, Tensor))


def test_multipliers_move_on_ticks_only() -> None:
    state = entered()
    for t in range(12):
        after = advance(state, t, t + 1, g=0.1)
        assert (not same(after.dual, state.dual)) == (t in (4, 9)), t
        assert (not same(after.penalty, state.penalty)) == (t in (4, 9)), t
        assert not same(after.filter, state.filter), t
        state = after


def test_ticks_count_from_the_phase() -> None:
    state, _ = control.step(
        FILTER, DUAL, PENALTY, entered(), torch.full((M,), 0.5), Clock(step=11, total=100, entered=7)
    )
    assert float(state.lam_M[0]) > 0


def test_hold() -> None:
    start = entered()
    held = advance(start, 0, 20, g=0.1, hold=("dual",))
    assert same(held.dual, start.dual)
    assert not same(held.penalty, start.penalty)
    assert not same(held.filter, start.filter)
    held = advance(start, 0, 20, g=0.1, hold=("penalty",))
    assert same(held.penalty, start.penalty)
    assert not same(held.dual, start.dual)


def test_off_rows_stay_bit_for_bit() -> None:
    mask_M = torch.tensor([True, False, True])
    start = entered(mask_M)
    after = advance(start, 0, 50, g=0.2)
    for part in ("filter", "dual", "penalty"):
        assert same(tree.where(mask_M, getattr(start, part), getattr(after, part)), getattr(start, part)), part
    assert bool((after.lam_M[mask_M] > 0).all())


def test_a_constraint_that_ends_hands_over() -> None:
    state = advance(entered(torch.tensor([True, True, False])), 0, 40, g=0.2)
    late = torch.tensor([False, False, True])
    new = control.enter(FILTER, PENALTY, evolve(state, on_M=~state.on_M), late, torch.ones(M), torch.full((M,), -3.0))
    heir = control.hand_over(new, [(0, 2)])
    for part in ("dual", "penalty"):
        for name, leaf in tree.flatten(getattr(heir, part)).items():
            before = tree.flatten(getattr(state, part))[name]
            assert isinstance(leaf, Tensor)
            assert isinstance(before, Tensor)
            assert torch.equal(leaf, before[[0, 1, 0]]), name
    assert float(heir.lam_M[2]) > 0
    assert float(heir.rho_M[2]) != 1.0
    assert same(heir.filter, new.filter)
    assert heir.budget_M.tolist() == [2.0, 3.0, 1.0]


SEEN: list[Signal] = []


@dual("spy")
class Spy:
    def init(self, m: int) -> LamState:
        return LamState(lam_M=torch.zeros(m))

    def step(self, state: LamState, signal: Signal) -> LamState:
        SEEN.append(signal)
        return state


@dual("restless")
class Restless:
    """Moves every multiplier, on or off: masking is the engine's work, not an author's."""

    def init(self, m: int) -> LamState:
        return LamState(lam_M=torch.zeros(m))

    def step(self, state: LamState, signal: Signal) -> LamState:
        return LamState(lam_M=state.lam_M + 1)


def test_a_law_that_ignores_the_mask_is_masked() -> None:
    state = control.init(FILTER, Restless(), PENALTY, M)
    state = control.enter(FILTER, PENALTY, state, torch.tensor([True, False, True]), torch.ones(M), torch.ones(M))
    for t in range(10):
        state, _ = control.step(FILTER, Restless(), PENALTY, state, torch.ones(M), Clock(step=t, total=100))
    assert state.lam_M.tolist() == [2.0, 0.0, 2.0]


def test_the_law_sees_the_penalties_in_force() -> None:
    SEEN.clear()
    penalty = Constant(rho=0.25)
    start = control.init(FILTER, Spy(), penalty, M)
    start = control.enter(FILTER, penalty, start, ALL, torch.ones(M), torch.ones(M))
    for t in range(10):
        g_M = torch.full((M,), float(t))
        start, out = control.step(FILTER, Spy(), penalty, start, g_M, Clock(step=t, total=100))
        assert torch.equal(out.g_M, g_M)
        assert out.rho_M.tolist() == [0.25] * M
    assert len(SEEN) == 2
    assert torch.equal(SEEN[1].previous_M, SEEN[0].fast_M), "previous is the fast mean of the last tick"
    assert not torch.equal(SEEN[1].fast_M, SEEN[0].fast_M)


def test_a_live_violation_is_refused() -> None:
    with pytest.raises(ValueError, match="graph"):
        control.step(FILTER, DUAL, PENALTY, entered(), torch.ones(M, requires_grad=True), Clock(step=0, total=10))


def test_pure() -> None:
    state = advance(entered(), 0, 4)
    before = copied(state)
    assert same(advance(state, 4, 5, g=0.1), advance(state, 4, 5, g=0.1))
    assert same(state, before)


@pytest.mark.parametrize("law", [Pi(), Adrc()], ids=["pi", "adrc"])
def test_no_host_copy(law: Any) -> None:
    """On the meta device no tensor has a value: asking for one fails."""
    law, meta = settled(law, every=5), torch.device("meta")
    state = tree.to(control.init(FILTER, law, PENALTY, M), meta)
    g_M, mask_M = torch.zeros(M, device=meta), torch.ones(M, dtype=torch.bool, device=meta)
    state = control.enter(FILTER, PENALTY, state, mask_M, g_M, g_M)
    gate = tree.to(Feasible().init(), meta)
    for t in range(10):
        state, seen = control.step(FILTER, law, PENALTY, state, g_M, Clock(step=t, total=10))
        gate = Feasible().step(gate, seen, Clock(step=t, total=10))
    assert state.lam_M.device == meta


def test_saved_and_resumed_is_bit_identical() -> None:
    law = settled(Adrc(), every=5)

    def run(state: ControlState, first: int, last: int) -> ControlState:
        for t in range(first, last):
            state, _ = control.step(FILTER, law, PENALTY, state, drawn(t, M), Clock(step=t, total=100))
        return state

    fresh = control.init(FILTER, law, PENALTY, M)
    start = control.enter(FILTER, PENALTY, fresh, ALL, torch.ones(M), drawn(99, M))
    half = run(start, 0, 33)
    flat = {k: v.clone() if isinstance(v, Tensor) else v for k, v in tree.flatten(half).items()}
    again = tree.restore(control.init(FILTER, law, PENALTY, M), flat)
    assert same(run(half, 33, 70), run(again, 33, 70))


def test_whole_loop_finds_a_known_multiplier() -> None:
    """min (x - 2)^2 subject to x <= 1, by gradient descent on the Lagrangian: x = 1, lam = 2."""
    filter, penalty = DualRateEma(every=1), Constant()
    law = Adrc(memory=25.0, delay=0.0, observer=0.05, bandwidth=0.05, every=1)
    x = torch.zeros(1, requires_grad=True)
    state = control.init(filter, law, penalty, 1)
    state = control.enter(filter, penalty, state, ALL[:1], torch.ones(1), x.detach() - 1)
    for t in range(1500):
        violations = Violations(names=("x",), g_M=x / state.budget_M - 1)
        loss = AlCole()((x - 2).square().sum(), violations, state)
        (grad,) = torch.autograd.grad(loss, x)
        x = (x.detach() - 0.01 * grad).requires_grad_()
        state, _ = control.step(filter, law, penalty, state, violations.g_M.detach(), Clock(step=t, total=1500))
    assert float(x.detach()) == pytest.approx(1.0, abs=1e-3)
    assert float(state.lam_M) == pytest.approx(2.0, abs=1e-3)
