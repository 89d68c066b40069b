"""Plan -> state: the right shapes, the same for a seed, and nothing measured yet."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from torch import Tensor

from spalf.core.tree import flatten
from spalf.engine.build import build
from spalf.errors import SourceError
from spalf.testing import toy_plan
from spalf.testing.whole import CPU, language_plan, moved, snapshot


def test_shapes_are_the_plan_s() -> None:
    plan = toy_plan(phase__fit__constraints='["orthogonality", "faithfulness"]')
    state = build(plan, CPU)
    sae, (F, D) = state.sae, (64, 16)
    assert sae.W_enc_FD.shape == sae.W_dec_FD.shape == (F, D)
    assert sae.b_enc_F.shape == state.silent_F.shape == (F,)
    assert sae.b_dec_D.shape == (D,)
    assert dict(sae.rows) == {"free": slice(0, F)}
    assert state.control.budget_M.shape == state.control.lam_M.shape == (2,)
    assert not bool(state.control.on_M.any())
    assert (state.clock.step, state.clock.total, state.clock.phase, state.clock.entered) == (0, 100, "calibrate", 0)
    assert state.anchors == {}
    assert state.measured == {}
    assert state.device == CPU


def test_strata_share_the_rows_in_their_order() -> None:
    state = build(language_plan(stratum__anchored__cap="40"), CPU)
    assert list(state.sae.rows.items()) == [("anchored", slice(0, 40)), ("free", slice(40, 256))]
    assert list(state.learner.strata) == ["anchored", "free"]
    assert state.sae.width == 256


def test_every_parameter_is_learnt_once() -> None:
    state = build(toy_plan(), CPU)
    own = [p for _, p in state.sae.named_parameters()]
    learnt = [p for group in state.learner.optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, own)) == sorted(map(id, learnt))
    assert len(state.learner.rates) == len(state.learner.optimizer.param_groups)
    assert set(state.learner.rates) == {3e-3}


def test_a_seed_is_a_state() -> None:
    one, same, other = (build(toy_plan(seed=seed), CPU) for seed in ("1", "1", "2"))
    assert moved(snapshot(one), snapshot(same)) == []
    assert moved(snapshot(one), snapshot(other)) == ["rng.device"]
    assert torch.equal(one.stream.next(64).x_BD, same.stream.next(64).x_BD)
    assert not torch.equal(one.stream.next(64).x_BD, other.stream.next(64).x_BD)


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    build(toy_plan(), CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_is_float32_but_for_its_moments() -> None:
    flat = flatten(build(toy_plan(), CPU))
    wide = {k for k, v in flat.items() if isinstance(v, Tensor) and v.dtype == torch.float64}
    assert {k.split(".")[0] for k in wide} <= {"phase", "metric"}
    assert {"phase.convergence.moments.mean_D", "phase.convergence.moments.scatter_DD"} <= wide


def test_a_source_that_cannot_be_read_says_so() -> None:
    plan = language_plan()
    plan = evolve(plan, recipe=evolve(plan.recipe, source=evolve(plan.recipe.source, text="/nowhere/at/all.txt")))
    with pytest.raises(SourceError, match=r"/nowhere/at/all\.txt"):
        build(plan, CPU)
