"""What the state refuses to be poured into, and what it makes of another device's numbers."""

from __future__ import annotations

import base64
from typing import Any

import pytest
import torch

from spalf.core.state import Rng
from spalf.core.tree import restore
from spalf.core.values import Facts
from spalf.engine.build import build, unopened
from spalf.errors import CheckpointError, SourceError
from spalf.testing import toy_plan
from spalf.testing.whole import CPU, moved, snapshot, started


def rng() -> Rng:
    return Rng(device=torch.Generator().manual_seed(7))


def text(state: bytes) -> dict[str, Any]:
    return {"device": base64.b64encode(state).decode()}


# --------------------------------------------------------------------------------------------------------------- draws
def test_a_generator_goes_on_where_it_was() -> None:
    one, other = rng(), Rng(device=torch.Generator())
    torch.rand(3, generator=one.device)
    other.load_state_dict(one.state_dict())
    assert torch.equal(torch.rand(4, generator=one.device), torch.rand(4, generator=other.device))


def test_another_device_s_state_is_a_seed() -> None:
    """16 bytes, as a CUDA generator has: the draws are a function of them, and of them alone."""
    draws = []
    for state in (bytes(range(16)), bytes(range(16)), bytes(range(1, 17))):
        one = rng()
        torch.rand(len(draws) + 1, generator=one.device)
        one.load_state_dict(text(state))
        draws.append(torch.rand(4, generator=one.device))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_what_is_no_state_is_told() -> None:
    with pytest.raises(CheckpointError, match="rng: "):
        restore({"rng": rng()}, {"rng.device": "not base64!"})
    with pytest.raises(CheckpointError, match="rng: "):
        restore({"rng": rng()}, {"rng.device": text(bytes(5056))["device"]})


# ------------------------------------------------------------------------------------------------------------ clipping
def test_what_is_held_has_no_share_in_the_norm() -> None:
    """A gain that stays where it is does not shorten the step of the others, however large its gradient is."""
    steps = []
    for slope in (0.0, 1e6):
        plan = toy_plan(optimizer='{ use = "sgd", gain_scale = 0.0, max_norm = 0.5, momentum = 0.0 }')
        state = build(plan, CPU)
        sae, before = state.sae, state.sae.b_enc_F.detach().clone()
        state.learner.descend(sae.b_enc_F.sum() + slope * sae.log_gain, state.clock)
        steps.append(sae.b_enc_F.detach() - before)
        assert float(sae.log_gain.detach()) == 0
    assert float(steps[0].norm()) > 0
    assert torch.equal(*steps)


# ------------------------------------------------------------------------------------------------------------- moments
@pytest.mark.parametrize("use", ["adam", "sgd"])
def test_moments_come_back(use: str) -> None:
    plan = toy_plan(optimizer=f'{{ use = "{use}" }}')
    state = started(plan, steps=2)
    fresh = build(plan, CPU)
    fresh.learner.load_state_dict(state.learner.state_dict())
    assert [k for k in moved(snapshot(state), snapshot(fresh)) if k.startswith("learner")] == []
    assert "optimizer.W_dec_FD." in state.learner.state_dict()["moments"]


def test_a_state_before_the_first_gradient_has_no_moments() -> None:
    plan = toy_plan()
    untrained = build(plan, CPU).learner.state_dict()
    assert untrained["moments"] == ""
    state = started(plan, steps=2)
    state.learner.load_state_dict(untrained)
    assert not state.learner.optimizer.state


def test_every_misfit_is_told() -> None:
    plan = toy_plan()
    flat = {f"learner.{k}": v for k, v in started(plan, steps=2).learner.state_dict().items()}
    flat["learner.optimizer.W_dec_FD.exp_avg"] = torch.zeros(64, 17)
    flat["learner.optimizer.W_nowhere.exp_avg"] = torch.zeros(3)
    flat["learner.optimizer.b_dec_D.third"] = torch.zeros(16)
    flat["learner.stray"] = 1.0
    del flat["learner.optimizer.W_enc_FD.step"], flat["learner.model.b_enc_F"]
    with pytest.raises(CheckpointError) as caught:
        restore({"learner": build(plan, CPU).learner}, flat)
    for told in (
        "optimizer.W_dec_FD.exp_avg: has shape (64, 17), its parameter's is (64, 16)",
        "optimizer.W_nowhere.exp_avg: belongs to no parameter",
        "optimizer.b_dec_D.third: was not saved with the rest",
        "stray: belongs to no parameter",
        "optimizer.W_enc_FD.step: missing",
        "b_enc_F",
    ):
        assert told in str(caught.value)


@pytest.mark.parametrize("lost", ["", "W_enc_FD."])
def test_lost_moments_are_missed(lost: str) -> None:
    plan = toy_plan()
    flat = started(plan, steps=2).learner.state_dict()
    left = {k: v for k, v in flat.items() if not k.startswith(f"optimizer.{lost}")}
    with pytest.raises(ValueError, match=r"optimizer\.W_enc_FD\.exp_avg: missing"):
        build(plan, CPU).learner.load_state_dict(left)


# -------------------------------------------------------------------------------------------------------------- stream
def test_a_stream_that_is_not_open_says_so() -> None:
    stream = unopened(Facts(d_model=16))
    stream.load_state_dict({"offset": 3})
    assert (stream.state_dict(), stream.facts.d_model) == ({}, 16)
    with pytest.raises(SourceError, match=r"stream\.next: this state was built without its source"):
        stream.next(1)
