"""Evaluator `power_diagram`: the slot's checks, the identity, and the control that must fail."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from spalf_pam.power import PowerDiagram, Sites, selected, sites

from spalf import Plan, TrainingState
from spalf.testing import conform, started, toy_plan

ACTIVATIONS = {
    "jumprelu": '{ use = "jumprelu" }',
    "jumprelu_moreau": '{ use = "jumprelu_moreau" }',
    "topk": '{ use = "topk" }',
    "topk_pre_bias": '{ use = "topk", pre_bias = true }',
    "batch_topk": '{ use = "batch_topk" }',
}
each = pytest.mark.parametrize("name", ACTIVATIONS)


@pytest.mark.parametrize("check", conform(PowerDiagram))
def test_conforms(check: Any) -> None:
    check()


@cache
def trained(name: str) -> tuple[Plan, TrainingState]:
    """100 steps of `pam` on planted features, F = 64; the decoder's bias far from 0, so that a pre-bias matters."""
    terms = '["l0"]' if name.startswith("jumprelu") else "[]"
    plan = toy_plan(
        activation=ACTIVATIONS[name],
        phases='["calibrate", "pam"]',
        constraint="{}",
        stratum__free__unit_norm="false",
        phase__pam=f'{{ use = "pam", encoder_steps = 5, rows = 640, weight = 0.05, terms = {terms} }}',
    )
    state = started(plan, 100)
    state.sae.b_dec_D.data.add_(2.0)
    return plan, state


@each
def test_the_selection_is_the_power_diagram(name: str) -> None:
    found = PowerDiagram(k=6, rows=2048)(*trained(name))
    assert found["topk"] == 1.0
    assert found["gates"] == 1.0
    assert found["signed_2F"] == 1.0
    assert found["tied"] < 0.01
    assert found["identity_error"] < 1e-5
    assert found["k"] == 6.0


@each
def test_the_control_fails(name: str) -> None:
    assert PowerDiagram(k=6, rows=2048)(*trained(name))["signed"] < 0.05


def test_a_pre_bias_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, state = trained("topk_pre_bias")

    def without(sae: Any) -> Sites:
        mu_FD = sae.W_enc_FD.detach().double()
        return Sites(mu_FD=mu_FD, weight_F=2 * sae.b_enc_F.detach().double() + mu_FD.square().sum(1))

    monkeypatch.setattr("spalf_pam.power.sites", without)
    found = PowerDiagram(k=6, rows=512)(plan, state)
    assert found["topk"] < 0.9
    assert found["identity_error"] > 1e-3


def test_5000_points_of_a_random_encoder() -> None:
    """In float64, without an autoencoder: power = ||x||^2 - 2 p to 1e-13, and one selection is the other."""
    draw = torch.Generator().manual_seed(0)
    e_FD = torch.randn(512, 48, generator=draw, dtype=torch.float64)
    b_F = torch.randn(512, generator=draw, dtype=torch.float64)
    x_BD = torch.randn(5000, 48, generator=draw, dtype=torch.float64)
    p_BF = x_BD @ e_FD.T + b_F
    diagram = Sites(mu_FD=e_FD, weight_F=2 * b_F + e_FD.square().sum(1))
    power_BF = diagram.power(x_BD)
    expected_BF = x_BD.square().sum(1, keepdim=True) - 2 * p_BF
    assert float((power_BF - expected_BF).abs().max() / expected_BF.abs().max()) < 1e-13
    assert torch.equal(selected(p_BF, 40), selected(-power_BF, 40))
    by_size_BF = selected(p_BF.abs(), 40)
    assert float((by_size_BF == selected(-power_BF, 40)).all(1).double().mean()) < 0.05
    both_BF = selected(-diagram.signed().power(x_BD), 40)
    assert torch.equal(by_size_BF, both_BF[:, :512] | both_BF[:, 512:])


def test_sites_are_the_encoder() -> None:
    _, state = trained("jumprelu")
    found = sites(state.sae)
    assert torch.equal(found.mu_FD.float(), state.sae.W_enc_FD.detach())
    weight_F = 2 * state.sae.b_enc_F.detach() + state.sae.W_enc_FD.detach().square().sum(1)
    torch.testing.assert_close(found.weight_F.float(), weight_F)
