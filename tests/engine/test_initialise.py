"""Rows, thresholds and gain at the start; what the phase's own tests do not reach."""

from __future__ import annotations

import pytest
import torch

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.values import Raw, White
from spalf.engine import initialise
from spalf.engine.build import build
from spalf.testing import toy_plan
from spalf.testing.whole import CPU, moved, snapshot


def start(plan: Plan) -> tuple[TrainingState, White]:
    """A state that is not initialised, and 2000 rows of its stream."""
    state = build(plan, CPU)
    return state, state.metric.white(state.stream.next(2000).x_BD)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = toy_plan()
    whole, white_BD = start(plan)
    initialise.initialise(plan, whole, white_BD)
    pieces, _ = start(plan)
    monkeypatch.setattr(initialise, "CHUNK", 7)
    initialise.initialise(plan, pieces, white_BD)
    a, b = snapshot(whole), snapshot(pieces)
    assert [k for k in moved(a, b) if not torch.allclose(a[k], b[k], rtol=1e-5, atol=1e-6)] == []  # type: ignore[arg-type]


def test_only_the_dictionary_changes() -> None:
    plan = toy_plan()
    state, white_BD = start(plan)
    state.silent_F += 5
    before = snapshot(state)
    initialise.initialise(plan, state, white_BD)
    changed = moved(before, snapshot(state))
    assert {k for k in changed if not k.startswith("learner.model.")} == {"rng.device", "silent_F"}
    assert {"learner.model.W_enc_FD", "learner.model.W_dec_FD", "learner.model.log_gain"} <= set(changed)
    assert "learner.model.b_enc_F" not in changed
    assert not bool(state.silent_F.any())


def test_no_part_of_the_start_carries_a_graph() -> None:
    plan = toy_plan()
    state, white_BD = start(plan)
    initialise.initialise(plan, state, White(Raw(white_BD).requires_grad_(True)))
    assert all(p.is_leaf and p.grad is None for _, p in state.sae.named_parameters())


def test_a_gain_has_a_least_value() -> None:
    """Where no row reconstructs anything, the logarithm of the gain is finite all the same."""
    plan = toy_plan()
    state, white_BD = start(plan)
    initialise.initialise(plan, state, White(torch.zeros_like(white_BD)))
    assert float(state.sae.log_gain.detach().exp()) == pytest.approx(1e-4)


@pytest.mark.parametrize("activation", ["jumprelu", "jumprelu_moreau"])
def test_every_activation_starts_at_its_density(activation: str) -> None:
    plan = toy_plan(activation=f'{{ use = "{activation}", start = 0.5 }}')
    state, white_BD = start(plan)
    initialise.initialise(plan, state, white_BD)
    share_F = state.sae.encode(white_BD).fired_F() / len(white_BD)
    assert initialise.start_density(plan) == 0.5 * 6 / 64
    assert torch.allclose(share_F, torch.full_like(share_F, 0.5 * 6 / 64), atol=2 / len(white_BD))
