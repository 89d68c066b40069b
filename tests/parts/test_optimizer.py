"""Optimizers: the kit's checks, the rates per parameter, clipping, and what is refused."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.slots import label
from spalf.core.values import Clock, Facts
from spalf.errors import ComponentError, RecipeError
from spalf.parts.optimizer import Adam, Adamw, Muon, Sgd
from spalf.parts.optimizer.adam import OneCall
from spalf.parts.schedule import Constant
from spalf.testing import conform, example
from spalf.testing.optimizer import PlainOps, checks, learner, loss_of, run

OPTIMIZERS = (Adam, Adamw, Muon, Sgd)
CHECKS = [pytest.param(check, id=f"{label(cls).use}-{check.__name__}") for cls in OPTIMIZERS for check in conform(cls)]
FLAT = Constant()


@pytest.mark.parametrize("check", CHECKS)
def test_conforms(check: Any) -> None:
    check()


@pytest.mark.parametrize(
    "check",
    checks(Adam, example(Adam, fused=False))
    + checks(Adamw, example(Adamw, fused=False, weight_decay=0.0))
    + checks(Muon, example(Muon, max_norm=1.0))
    + checks(Sgd, example(Sgd, momentum=0.0)),
)
def test_other_forms_conform(check: Any) -> None:
    check()


def plan(d_model: int = 64) -> Plan:
    """As much of a plan as an optimizer asks for."""
    return cast(Plan, SimpleNamespace(total_steps=1000, facts=Facts(d_model=d_model)))


def parameters(built: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in built.sae.named_parameters()}


def test_adam_fused_is_adam_plain() -> None:
    fused, plain = learner(example(Adam, lr=0.01)), learner(example(Adam, lr=0.01, fused=False))
    torch.testing.assert_close(run(fused, 0, 50), run(plain, 0, 50), rtol=1e-6, atol=0)
    assert fused.optimizer.param_groups[0]["fused"] is True


def test_one_call_for_all_parameters_is_torchs_own_adam() -> None:
    """Bit for bit, with two rates, a parameter without a gradient, and after a rate has changed."""
    first = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 32), (64,), (), (3,))]
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    found = OneCall([{"params": [p], "lr": 0.1 / (1 + i // 2)} for i, p in enumerate(first)], lr=1.0, fused=True)
    known = torch.optim.Adam([{"params": [p], "lr": 0.1 / (1 + i // 2)} for i, p in enumerate(second)], fused=True)
    for step in range(5):
        for p, q in zip(first[:3], second[:3], strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for made in (found, known):
            made.param_groups[0]["lr"] = 0.1 / (1 + step)
            made.step()
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    one, two = (made.state_dict()["state"] for made in (found, known))
    assert one.keys() == two.keys() == {0, 1, 2}
    assert all(torch.equal(one[i][k], two[i][k]) for i in one for k in ("step", "exp_avg", "exp_avg_sq"))
    found.zero_grad()
    assert all(p.grad is None for p in first)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_rates_by_parameter(cls: Any) -> None:
    built = learner(cls(lr=0.01, schedule=FLAT, encoder_scale=2.0, threshold_scale=3.0, gain_scale=0.0))
    rates = {group["name"]: round(group["lr"] / 0.01, 6) for group in built.optimizer.param_groups}
    assert rates == {
        "W_enc_FD": 2.0,
        "W_dec_FD": 1.0,
        "b_enc_F": 2.0,
        "b_dec_D": 1.0,
        "log_gain": 0.0,
        "_activator.log_threshold_F": 3.0,
    }
    before = parameters(built)
    run(built, 0, 3)
    moved = {name for name, p in built.sae.named_parameters() if not torch.equal(before[name], p)}
    assert moved == set(rates) - {"log_gain"}


def test_multipliers_move_their_parameter_only() -> None:
    """Adam's first step has the size of the rate, whatever the gradient."""
    built = learner(Adam(lr=0.01, schedule=FLAT, threshold_scale=4.0))
    before = parameters(built)
    run(built, 0, 1)
    moved = {name: float((before[name] - p).detach().abs().max()) for name, p in built.sae.named_parameters()}
    assert moved["_activator.log_threshold_F"] == pytest.approx(0.04, rel=1e-3)
    assert moved["W_enc_FD"] == pytest.approx(0.01, rel=1e-3)


def test_weight_decay_falls_on_the_encoder_alone() -> None:
    """Decoupled: after equal gradients the difference is lr * weight_decay * w, and only there."""
    plain, decayed = (learner(Adamw(lr=0.01, schedule=FLAT, weight_decay=w)) for w in (0.0, 0.5))
    before = parameters(plain)
    for built in (plain, decayed):
        run(built, 0, 1)
    one, two = parameters(plain), parameters(decayed)
    torch.testing.assert_close(one["W_enc_FD"] - two["W_enc_FD"], 0.01 * 0.5 * before["W_enc_FD"], rtol=1e-4, atol=1e-7)
    assert all(torch.equal(one[name], two[name]) for name in one if name != "W_enc_FD")


def test_muon_steps_are_orthogonal_and_as_long_as_adams() -> None:
    """The step's singular values are equal up to the iteration's tolerance, entries 0.2 of the rate (2502.16982)."""
    built = learner(Muon(lr=0.01, schedule=FLAT))
    before = parameters(built)["W_enc_FD"]
    run(built, 0, 1)
    step_FD = (parameters(built)["W_enc_FD"] - before) / 0.01
    singular = torch.linalg.svdvals(step_FD)
    assert float(singular.max() / singular.min()) < 2.0
    gradient = torch.linalg.svdvals(2 * (before - 1))
    assert float(gradient.max() / gradient.min()) > 2.5, "the gradient is orthogonal itself: the test says nothing"
    assert 0.5 < float(step_FD.square().mean().sqrt()) / 0.2 < 1.3


def test_muon_needs_a_torch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ComponentError, match=r"has no Muon \(install torch>=2.9, or use adam\)"):
        learner(example(Muon))


# ---------------------------------------------------------------------------------------------------------- clipping
def test_the_gradient_is_clipped_to_its_norm() -> None:
    """Plain descent shows the gradient as it was used: its length is rate times max_norm, its direction the same."""
    free, bound = (learner(Sgd(lr=0.01, schedule=FLAT, momentum=0.0, max_norm=m)) for m in (0.0, 0.5))
    before = parameters(free)
    steps = []
    for built in (free, bound):
        built.strata = {"free": SimpleNamespace(project_=lambda w: None, project_gradient_=lambda w, g: None)}  # type: ignore[dict-item]
        run(built, 0, 1)
        steps.append(torch.cat([(before[n] - p).flatten() for n, p in parameters(built).items()]))
    assert float(steps[0].norm()) > 0.01
    assert float(steps[1].norm()) == pytest.approx(0.01 * 0.5, rel=1e-4)
    torch.testing.assert_close(steps[1] / steps[1].norm(), steps[0] / steps[0].norm(), rtol=1e-4, atol=1e-5)


def test_a_short_gradient_is_left_as_it_is() -> None:
    free, bound = (learner(example(Adam, max_norm=m)) for m in (0.0, 1e6))
    run(free, 0, 5)
    run(bound, 0, 5)
    one, two = parameters(free), parameters(bound)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("max_norm", "fused"), [(0.0, 1), (1.0, 0)])
def test_clipping_forgoes_a_fused_update(max_norm: float, fused: int) -> None:
    calls: list[Any] = []

    class Fusing(PlainOps):
        def update(self, learner: Any, loss: Any) -> bool:
            calls.append(learner)
            return True

    built = learner(example(Adam, max_norm=max_norm))
    object.__setattr__(built.sae.machine, "ops", Fusing())
    built.descend(loss_of(built), Clock(step=0, total=10))
    assert len(calls) == fused


# ----------------------------------------------------------------------------------------------------------- refusals
def test_derived_rows() -> None:
    rows = {row.path: row for row in example(Adam, lr=0.01, encoder_scale=2.0).derive(plan())}
    assert rows["optimizer.relative_step"].value == pytest.approx(0.01 * 2 * 8)
    [row] = example(Muon, lr=0.01).derive(plan())
    assert row.value == pytest.approx(0.2 * 0.01 * 8)
    assert row.formula.startswith("0.2 * lr")


@pytest.mark.parametrize("cls", [Adam, Adamw])
def test_a_step_that_would_turn_rows_over_is_refused(cls: Any) -> None:
    example(cls, lr=0.02).settle(plan())
    with pytest.raises(RecipeError, match=r"lr: one step would move a unit row .* by 0.4 .*lower lr to 0.03"):
        example(cls, lr=0.05).settle(plan())
    with pytest.raises(RecipeError, match="encoder_scale"):
        example(cls, lr=0.02, encoder_scale=5.0).settle(plan())


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}, {"max_norm": -1.0}])
def test_options_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        example(Adam, **bad)
