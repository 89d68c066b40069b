"""Features in context: chosen by density alone, shown where they peak, on documents that training never saw."""

from __future__ import annotations

import pytest
import torch

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.engine.examples import FeatureExample, examples
from spalf.testing import toy_plan
from spalf.testing.whole import moved, snapshot, stage_for, started

S = 40


@pytest.fixture(scope="module")
def stage() -> tuple[Plan, TrainingState]:
    return stage_for(frozenset({"tokens"}))


@pytest.fixture(scope="module")
def shown(stage: tuple[Plan, TrainingState]) -> list[FeatureExample]:
    return examples(*stage, features=6, contexts=3, sequences=S, window=5)


@pytest.fixture(scope="module")
def codes(stage: tuple[Plan, TrainingState]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [S, T] of the held-out sequences and their codes [S, T, F], 0 at the first position."""
    _, state = stage
    with torch.no_grad():
        sequences = state.stream.held_out().sequences(S)
        x_STD = state.stream.activations(sequences)
        z_BF = state.sae.encode(state.metric.white(x_STD.flatten(0, 1))).dense()
    z_STF = z_BF.reshape(*x_STD.shape[:2], -1).clone()
    z_STF[:, 0] = 0
    return sequences.tokens_ST, z_STF


def test_spread_evenly_over_the_densities(
    shown: list[FeatureExample], codes: tuple[torch.Tensor, torch.Tensor]
) -> None:
    _, z_STF = codes
    density_F = (z_STF[:, 1:] > 0).double().mean((0, 1))
    assert [e.density for e in shown] == pytest.approx([float(density_F[e.feature]) for e in shown])
    ordered = density_F[density_F >= 3 / (S * (z_STF.shape[1] - 1))].sort(descending=True).values
    ranks = [int((i + 0.5) / 6 * len(ordered)) for i in range(6)]
    assert [e.density for e in shown] == pytest.approx([float(ordered[r]) for r in ranks])
    assert shown[0].density > 2 * shown[-1].density


def test_contexts_are_the_strongest_of_as_many_sequences(
    shown: list[FeatureExample], codes: tuple[torch.Tensor, torch.Tensor], stage: tuple[Plan, TrainingState]
) -> None:
    tokens_ST, z_STF = codes
    for example in shown:
        peak_S, at_S = z_STF[:, :, example.feature].max(1)
        best = peak_S.argsort(descending=True)[:3].tolist()
        assert [c.values[c.peak] for c in example.contexts] == pytest.approx([float(peak_S[s]) for s in best], rel=1e-5)
        for context, s in zip(example.contexts, best, strict=True):
            at = int(at_S[s])
            begin, end = max(0, at - 5), min(tokens_ST.shape[1], at + 3)
            assert context.peak == at - begin
            assert context.tokens == tuple(stage[1].stream.text(tokens_ST[s, begin:end]))
            assert context.values == pytest.approx(z_STF[s, begin:end, example.feature].tolist(), rel=1e-5, abs=1e-6)
            assert max(context.values) == context.values[context.peak] > 0


def test_strata_are_named(shown: list[FeatureExample], stage: tuple[Plan, TrainingState]) -> None:
    rows = stage[1].sae.rows
    assert all(rows[e.stratum].start <= e.feature < rows[e.stratum].stop for e in shown)
    assert len({e.feature for e in shown}) == 6


def test_more_features_than_fire(stage: tuple[Plan, TrainingState]) -> None:
    """All that fire often enough, densest first."""
    plan, state = stage
    few = examples(plan, state, features=10_000, contexts=2, sequences=8)
    densities = [e.density for e in few]
    assert densities == sorted(densities, reverse=True)
    assert 50 < len(few) <= plan.knobs.F


def test_a_context_without_a_peak_is_not_shown(stage: tuple[Plan, TrainingState]) -> None:
    """A feature that fires in two sequences has two contexts, however many are asked for."""
    plan, state = stage
    found = examples(plan, state, features=10_000, contexts=8, sequences=8)
    assert min(len(e.contexts) for e in found) < 8
    assert all(c.values[c.peak] > 0 for e in found for c in e.contexts)


def test_deterministic_and_without_a_trace(stage: tuple[Plan, TrainingState], shown: list[FeatureExample]) -> None:
    plan, state = stage
    before = snapshot(state)
    assert examples(plan, state, features=6, contexts=3, sequences=S, window=5) == shown
    assert moved(before, snapshot(state)) == []


def test_no_tokens_no_examples() -> None:
    plan = toy_plan()
    assert examples(plan, started(plan, steps=1)) == []
