"""Token features on a planted world: one activation per token, and rows that are told what they are of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.state import Anchor, TrainingState
from spalf.core.values import Raw, Sequences
from spalf.engine.build import build
from spalf.parts.evaluator import TokenFeatures
from spalf.testing import toy_plan
from spalf.testing.whole import CPU

V, ANCHORS, LENGTH = 16, 8, 32


class World:
    """A stream of random tokens, the low ids commoner; also its own held-out part. Activations are one-hot."""

    def __init__(self, ahead: int = 0) -> None:
        self._ahead = ahead  # how far before its token an activation stands

    def sequences(self, n: int) -> Sequences:
        draw = torch.Generator().manual_seed(n)
        tokens_ST = torch.multinomial(1.0 / torch.arange(1.0, V + 1), n * LENGTH, replacement=True, generator=draw)
        tokens_ST = tokens_ST.reshape(n, LENGTH)
        return Sequences(tokens_ST=tokens_ST, real_ST=torch.ones_like(tokens_ST, dtype=torch.bool))

    def activations(self, sequences: Sequences) -> Raw:
        x_STD = torch.eye(V)[sequences.tokens_ST.roll(-self._ahead, dims=1)]
        x_STD[:, LENGTH - self._ahead :] = 0.0
        return Raw(x_STD)

    def held_out(self) -> World:
        return self


@pytest.fixture
def world() -> tuple[Plan, TrainingState]:
    """Feature f fires on token f, ever stronger with f; the first rows are anchored to the tokens of their own ids."""
    plan = toy_plan(whitener="identity", source__d_model=str(V), knobs__F=str(V))
    state = build(plan, CPU)
    plan = evolve(plan, facts=evolve(plan.facts, n_vocab=V, provides=frozenset({"tokens", "activations"})))
    state.learner.assign("W_enc_FD", torch.diag(torch.linspace(2.0, 3.0, V)))
    state.learner.assign("W_dec_FD", torch.eye(V))
    state.learner.assign("_activator.log_threshold_F", torch.zeros(V))
    stand_in(state, World())
    state.sae._rows = {"anchored": slice(0, ANCHORS), "free": slice(ANCHORS, V)}  # type: ignore[attr-defined]
    state.anchors["anchored"] = Anchor(directions_AD=Raw(torch.eye(V)[:ANCHORS]), ids_A=torch.arange(ANCHORS))
    return plan, state


def stand_in(state: TrainingState, stream: Any) -> None:
    state.stream = stream


def encode_by(state: TrainingState, rows_FD: Tensor) -> None:
    state.learner.assign("W_enc_FD", rows_FD)


def test_rows_that_are_of_their_tokens(world: tuple[Plan, TrainingState]) -> None:
    out = TokenFeatures(sequences=16, top=2)(*world)
    ones = ("single", "single.anchored", "single.free", "detected", "fires", "own_peak", "own_f1")
    assert [out.get(name, out.get(f"anchored.{name}")) for name in ones] == [1.0] * len(ones)
    assert out["tokens"] == V // 4
    assert out["anchored.own_next"] < 0.5


def test_exchanged_rows_are_found_but_not_by_their_names(world: tuple[Plan, TrainingState]) -> None:
    plan, state = world
    order = torch.arange(V)
    order[:3] = torch.tensor([1, 2, 0])
    encode_by(state, 3.0 * torch.eye(V)[order])
    out = TokenFeatures(sequences=16, top=2, tokens=V)(plan, state)
    assert (out["detected"], out["single"]) == (1.0, 1.0)
    assert out["anchored.own_peak"] == out["anchored.own_f1"] == (ANCHORS - 3) / ANCHORS


def test_a_row_for_two_tokens_and_a_silent_one(world: tuple[Plan, TrainingState]) -> None:
    """Row 0 fires on tokens 0 and 1, strongest on 1; row 1 never fires: F1 of either token by row 0 is known."""
    plan, state = world
    rows_FD = 3.0 * torch.eye(V)
    rows_FD[0, 1], rows_FD[1] = 4.0, 0.0
    encode_by(state, rows_FD)
    out = TokenFeatures(sequences=64, top=2, tokens=2)(plan, state)
    count_V = torch.bincount(World().sequences(16).tokens_ST[:, 1:].flatten(), minlength=V).double()
    zero, one = (2 * float(count_V[v]) / float(count_V[v] + count_V[:2].sum()) for v in (0, 1))
    assert out["anchored.fires"] == (ANCHORS - 1) / ANCHORS
    assert out["anchored.own_peak"] == (ANCHORS - 2) / (ANCHORS - 1)
    assert out["single"] == 1.0, "the strongest two are both of token 1"
    assert out["detected"] == pytest.approx((zero + one) / 2)
    assert out["anchored.own_f1"] == pytest.approx((zero + ANCHORS - 2) / ANCHORS)
    out = TokenFeatures(sequences=64, top=10**6)(plan, state)
    assert "single" not in out, "no feature fires so often"


def test_a_row_that_speaks_of_what_comes_next(world: tuple[Plan, TrainingState]) -> None:
    plan, state = world
    stand_in(state, World(ahead=1))
    out = TokenFeatures(sequences=16)(plan, state)
    assert out["anchored.own_next"] == 1.0
    assert out["anchored.own_peak"] < 0.5
    assert out["detected"] < 0.5


def test_any_dictionary_against_a_count_in_numpy(world: tuple[Plan, TrainingState]) -> None:
    plan, state = world
    encode_by(state, torch.randn(V, V, generator=torch.Generator().manual_seed(3)) * 2.0)
    state.sae._rows = {"free": slice(0, V)}  # type: ignore[attr-defined]
    state.anchors.clear()
    out = TokenFeatures(sequences=16, top=3, tokens=5)(plan, state)
    token_R = World().sequences(16).tokens_ST[:, 1:].flatten()
    z_RF = state.sae.encode(state.metric.white(Raw(torch.eye(V)[token_R]))).dense().detach().numpy()
    token = token_R.numpy()
    count = np.bincount(token, minlength=V)
    f1 = np.zeros((V, V))
    for f in range(V):
        for v in range(V):
            both = ((z_RF[:, f] > 0) & (token == v)).sum()
            f1[f, v] = 2 * both / max(1, (z_RF[:, f] > 0).sum() + count[v])
    assert out["detected"] == pytest.approx(f1.max(0)[np.argsort(-count, kind="stable")[:5]].mean())
    single = []
    for f in np.nonzero((z_RF > 0).sum(0) >= 3)[0]:
        single.append(len(set(token[np.argsort(-z_RF[:, f], kind="stable")[:3]])) == 1)
    assert out["single"] == pytest.approx(np.mean(single))
    assert set(out) == {"detected", "tokens", "single"}
