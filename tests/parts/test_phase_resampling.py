"""`resampling`: dead features live again, from poorly reconstructed inputs, with nothing left of what they were.

Shapes as in spalf/parts/phase/resampling.py.
"""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spalf.core.recipe import Plan
from spalf.core.slots import label
from spalf.core.state import Anchor, TrainingState
from spalf.core.values import Raw
from spalf.errors import RecipeError
from spalf.parts import activation as activations
from spalf.parts import phase as phases
from spalf.parts.phase import resampling as module
from spalf.parts.phase.resampling import Resampling, silent
from spalf.testing import toy_plan
from spalf.testing.whole import advance, enter, moved, snapshot, started

pytestmark = pytest.mark.slow  # together more than `make check` has time for

PHASE = '{{ use = "resampling", constraints = [{}], gate = "exhausted", every = {}, window = {}, until = {} }}'
DEAD = torch.tensor([3, 4, 17, 40, 63])


def plan_of(every: int = 10, window: int = 1000, until: float = 1.0, **sets: str) -> Plan:
    sets.setdefault("phase__fit", PHASE.format('"faithfulness"', every, window, until))
    return toy_plan(**sets)


def kill(state: TrainingState, features_R: Tensor) -> None:
    """Thresholds out of reach, and as silent as can be."""
    state.sae.activator.state_dict()["log_threshold_F"][features_R] = 6.0
    state.silent_F[features_R] = 10**6


def killed(plan: Plan, steps: int = 9) -> TrainingState:
    """`steps` steps into the phase, with five dead features."""
    state = started(plan, steps=steps)
    kill(state, DEAD)
    return state


def phase_of(plan: Plan) -> Resampling:
    phase = plan.recipe.phase["fit"]
    assert isinstance(phase, Resampling)
    return phase


def moments(state: TrainingState) -> dict[str, Tensor]:
    """Every moment that has a row per feature, by name."""
    return {
        f"{name}.{key}": value
        for name, p in state.sae.named_parameters()
        for key, value in state.learner.optimizer.state[p].items()
        if value.ndim and name != "b_dec_D"
    }


# ------------------------------------------------------------------------------------------------------ a new start
def test_dead_features_fire_again_and_their_moments_are_zero() -> None:
    plan = plan_of(every=10, until=0.3)
    state = killed(plan)
    assert all(bool((m[DEAD] != 0).any()) for m in moments(state).values())
    advance(plan, state, 1)  # the tenth: its own gradient comes first, so that zero moments are the reset's
    assert state.measured["fit.resampled"] == 5.0
    assert len(moments(state)) == 8  # two of each matrix, of the encoder's bias and of the thresholds
    assert all(not bool(m[DEAD].any()) for m in moments(state).values())
    assert all(bool(m.any()) for m in moments(state).values()), "the moments of others went, too"
    assert state.silent_F[DEAD].tolist() == [0] * 5
    advance(plan, state, 15)
    batch = state.stream.held_out().next(4096)
    fired_F = state.sae.encode(state.metric.white(batch.x_BD)).fired_F()
    assert bool((fired_F[DEAD] > 0).all()), f"of 4096 rows they fire on {fired_F[DEAD].tolist()}"
    assert bool((state.silent_F[DEAD] < 128 * 15).all())


def test_without_it_they_stay_dead() -> None:
    """The control: the same run under `constrained`."""
    plan = plan_of(phase__fit='{ use = "constrained", constraints = ["faithfulness"], gate = "exhausted" }')
    state = killed(plan)
    advance(plan, state, 16)
    assert bool((state.silent_F[DEAD] >= 10**6).all())


def test_rows_are_inputs_and_the_rest_stays() -> None:
    plan = plan_of()
    state = killed(plan)
    before = snapshot(state)
    cursor = state.stream.state_dict()
    phase_of(plan).resample_(plan, state, DEAD)
    stream = plan.recipe.source.open(plan.recipe.seed, state.device)
    stream.load_state_dict(cursor)
    white_ND = state.metric.white(stream.next(8192).x_BD)
    inputs_ND = normalize(white_ND - state.sae.b_dec_D.detach(), dim=1)
    after = snapshot(state)
    rows_RD = state.sae.W_dec_FD.detach()[DEAD]
    cosine_RN = rows_RD @ inputs_ND.T
    torch.testing.assert_close(cosine_RN.max(1).values, torch.ones(5), atol=1e-5, rtol=0)
    assert len(set(cosine_RN.argmax(1).tolist())) == 5, "two features got one input"
    alive = torch.ones(64, dtype=torch.bool)
    alive[DEAD] = False
    old_FD = before["learner.model.W_enc_FD"]
    assert isinstance(old_FD, Tensor)
    wanted = 0.2 * old_FD[alive].norm(dim=1).mean()
    torch.testing.assert_close(state.sae.W_enc_FD.detach()[DEAD], wanted * rows_RD, rtol=1e-5, atol=1e-6)
    assert not bool(state.sae.b_enc_F[DEAD].any())
    for key in ("W_enc_FD", "b_enc_F", "_activator.log_threshold_F", "_activator.bandwidth_F"):
        old, new = before[f"learner.model.{key}"], after[f"learner.model.{key}"]
        assert isinstance(old, Tensor)
        assert isinstance(new, Tensor)
        assert torch.equal(old[alive], new[alive]), key
        assert key == "b_enc_F" or bool((old[DEAD] != new[DEAD]).any(-1).all()), key
    apart = {key.split(".")[0] for key in moved(before, after)}
    assert apart == {"learner", "rng", "silent_F", "stream"}


def test_thresholds_hit_the_targets_density() -> None:
    plan = plan_of()
    state = killed(plan)
    phase_of(plan).resample_(plan, state, DEAD)
    x_BD = state.stream.held_out().next(20_000).x_BD
    share_F = state.sae.encode(state.metric.white(x_BD)).fired_F()[DEAD] / 20_000
    target = 6 / 64
    # the quantile of 8192 rows, seen on 20,000: a standard error of 0.0038
    assert float((share_F - target).abs().max()) < 4 * 0.0038


def test_inputs_are_drawn_by_their_squared_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of 1 and 3: a draw of one takes a row of the second half 9 times of 10."""
    plan = plan_of()
    state = killed(plan)

    def seen(self: Resampling, plan: Plan, state: TrainingState, x_ND: Raw) -> tuple[Tensor, Tensor]:
        half = len(x_ND) // 2
        return torch.cat([torch.ones(half), torch.full((len(x_ND) - half,), 3.0)]), torch.zeros(len(x_ND))

    drawn: list[int] = []
    multinomial = torch.multinomial

    def spy(*args: Any, **options: Any) -> Tensor:
        out = multinomial(*args, **options)
        drawn.extend(out.tolist())
        return out

    monkeypatch.setattr(Resampling, "_look", seen)
    monkeypatch.setattr(torch, "multinomial", spy)
    for _ in range(100):
        phase_of(plan).resample_(plan, state, DEAD[:1])
    share = sum(n >= 4096 for n in drawn) / 100
    assert abs(share - 0.9) < 4 * (0.9 * 0.1 / 100) ** 0.5


@pytest.mark.parametrize("space", ["raw", "white"])
def test_the_loss_is_the_error_in_its_space(space: str) -> None:
    plan = plan_of()
    state = killed(plan)
    phase = attrs.evolve(phase_of(plan), space=space)
    x_ND = state.stream.next(300).x_BD
    with torch.no_grad():
        white_ND = state.metric.white(x_ND)
        hat_ND = state.sae.decode(state.sae.encode(white_ND))
        wanted = (x_ND - state.metric.raw(hat_ND)) if space == "raw" else white_ND - hat_ND
        found_N, _ = phase._look(plan, state, x_ND)
    torch.testing.assert_close(found_N, wanted.square().sum(-1), rtol=1e-3, atol=1e-4)


def test_a_perfect_reconstruction_offers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    state = killed(plan)
    monkeypatch.setattr(Resampling, "_look", lambda self, plan, state, x_ND: (torch.zeros(len(x_ND)),) * 2)
    before = snapshot(state)
    assert phase_of(plan).resample_(plan, state, DEAD) == 0
    assert {key.split(".")[0] for key in moved(before, snapshot(state))} == {"stream"}


def test_more_silent_features_than_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.initialise, "sample_size", lambda density: 3)
    plan = plan_of()
    state = killed(plan)
    state.silent_F[DEAD] += torch.arange(5)
    features_R = silent(state, 10**6)
    assert features_R.tolist() == [63, 40, 17, 4, 3]
    assert phase_of(plan).resample_(plan, state, features_R) == 3
    assert (state.silent_F[DEAD] == 0).tolist() == [False, False, True, True, True]


# ---------------------------------------------------------------------------------------------------- when, and which
def test_when_it_resamples() -> None:
    """Steps 10, 20 and 30 of 100, and no step after `until`."""
    plan = plan_of(every=10, until=0.3)
    state = started(plan, steps=0)
    seen = []
    for step in range(1, 61):
        kill(state, DEAD)
        reading = plan.recipe.phase["fit"].step(plan, state)
        if "resampled" in reading.values:
            seen.append((step, float(reading.values["resampled"])))
    assert seen == [(10, 5.0), (20, 5.0), (30, 5.0)]
    assert state.measured["fit.resampled"] == 15.0


def test_features_that_fire_are_left_alone() -> None:
    plan = plan_of(every=10, window=10**6)
    state = started(plan, steps=10)
    assert state.measured["fit.resampled"] == 0.0


def test_anchored_rows_are_never_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    state = started(plan_of(), steps=3)
    monkeypatch.setattr(state.sae, "_rows", {"anchored": slice(0, 16), "free": slice(16, 64)})
    state.anchors["anchored"] = Anchor(directions_AD=Raw(torch.zeros(16, 16)), ids_A=torch.arange(16))
    state.silent_F[:] = 10**6
    assert sorted(silent(state, 1000).tolist()) == list(range(16, 64))


def test_decoder_rows_stay_unit() -> None:
    plan = plan_of()
    state = killed(plan)
    advance(plan, state, 3)
    assert torch.allclose(state.sae.W_dec_FD.detach().norm(dim=1), torch.ones(64), atol=1e-6)


def test_without_every_it_is_constrained() -> None:
    """The numbers of the phase beneath it are its own until the first resampling."""
    plain = plan_of(phase__fit='{ use = "constrained", constraints = ["faithfulness"], gate = "exhausted" }')
    plan = plan_of(every=50)
    one, two = started(plain, steps=20), started(plan, steps=20)
    assert not moved(snapshot(one), snapshot(two))


# ------------------------------------------------------------------------------------------------- every activation
CLASSES = [cls for cls in vars(activations).values() if isinstance(cls, type) and "__spalf__" in vars(cls)]


@pytest.mark.parametrize("use", [label(cls).use for cls in CLASSES])
def test_it_works_with_every_activation(use: str) -> None:
    """New features fire about as often as they should, what all features share stays, and all stays finite."""
    terms = 'terms = ["l1"], ' if use in ("relu", "topk", "batch_topk", "gated") else ""
    phase = PHASE.format('"faithfulness"', 4, 300, 1.0).replace("constraints", terms + "constraints")
    plan = plan_of(activation=f"'{use}'", phase__fit=phase, term__l1="{}")
    state = started(plan, steps=3)
    state.silent_F[DEAD] = 10**6
    held = state.sae.activator.state_dict()
    shared = {k: v.clone() for k, v in held.items() if not (v.ndim and len(v) == 64)}
    assert phase_of(plan).resample_(plan, state, DEAD) == 5
    assert all(torch.equal(state.sae.activator.state_dict()[k], v) for k, v in shared.items())
    white_BD = state.metric.white(state.stream.held_out().next(4096).x_BD)
    share_F = state.sae.encode(white_BD).fired_F() / 4096
    least, most = (0.2, 0.6) if use == "relu" else (0.6 * 6 / 64, 1.4 * 6 / 64)
    assert float(share_F[DEAD].min()) > least
    assert float(share_F[DEAD].max()) < most
    advance(plan, state, 6)
    assert all(bool(p.isfinite().all()) for _, p in state.sae.named_parameters())
    assert bool((state.sae.encode(white_BD).fired_F()[DEAD] > 0).all())


# ----------------------------------------------------------------------------------------------------------- options
def test_what_is_derived() -> None:
    plan = toy_plan(phase__fit='{ use = "resampling", constraints = ["faithfulness"], gate = "exhausted" }')
    phase = phase_of(plan)
    assert (phase.every, phase.window) == (100 // 8, 12 * 128 // 2)
    rows = {row.path: row.value for row in plan.derived}
    assert rows["phase.fit.every"] == 12
    assert rows["phase.fit.window"] == 768
    assert rows["phase.fit.last"] == 50
    assert phase.settle(plan) == phase


def test_a_phase_that_would_never_resample_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"phase\.fit\.every: 60 steps come after the last one that may resample, 50"):
        plan_of(every=60, until=0.5)


def test_it_is_shipped() -> None:
    assert label(phases.Resampling).use == "resampling"


def test_enter_is_that_of_constrained() -> None:
    plan = plan_of()
    state = started(plan, steps=0)
    enter(plan, state, "fit")
    assert state.control.on_M.tolist() == [True]
