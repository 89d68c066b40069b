"""Optimizers: the kit's checks, the rates per parameter, the schedule, and what is refused."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spalf.core.recipe import Plan
from spalf.core.values import Clock, Facts
from spalf.errors import RecipeError
from spalf.parts.optimizer import Adam, Sgd, warmup_steps
from spalf.testing import conform, example
from spalf.testing.optimizer import checks, learner, run


@pytest.mark.parametrize("check", [check for cls in (Adam, Sgd) for check in conform(cls)])
def test_conforms(check) -> None:
    check()


@pytest.mark.parametrize("check", checks(Adam, example(Adam, fused=False)) + checks(Sgd, example(Sgd, momentum=0.0)))
def test_plain_forms_conform(check) -> None:
    check()


def plan(total: int = 1000, d_model: int = 64) -> Plan:
    """As much of a plan as an optimizer asks for."""
    return cast(Plan, SimpleNamespace(total_steps=total, facts=Facts(d_model=d_model)))


def test_adam_fused_is_adam_plain() -> None:
    fused, plain = learner(Adam(lr=0.01)), learner(Adam(lr=0.01, fused=False))
    torch.testing.assert_close(run(fused, 0, 50), run(plain, 0, 50), rtol=1e-6, atol=0)
    assert fused.optimizer.param_groups[0]["fused"] is True


def test_rates_by_parameter() -> None:
    built = learner(Adam(lr=0.01, encoder_scale=2.0, threshold_scale=3.0, gain_scale=5.0))
    rates = {group["name"]: round(group["lr"] / 0.01, 6) for group in built.optimizer.param_groups}
    assert rates == {
        "W_enc_FD": 2.0,
        "W_dec_FD": 1.0,
        "b_enc_F": 2.0,
        "b_dec_D": 1.0,
        "log_gain": 5.0,
        "_activator.log_threshold_F": 3.0,
    }


def test_multipliers_move_their_parameter_only() -> None:
    """Adam's first step has the size of the rate, whatever the gradient."""
    before, after = (learner(Adam(lr=0.01, warmup=1, threshold_scale=4.0)) for _ in range(2))
    run(after, 0, 1)
    moved = {
        name: float((a - b).detach().abs().max())
        for (name, a), (_, b) in zip(before.sae.named_parameters(), after.sae.named_parameters(), strict=True)
    }
    assert moved["_activator.log_threshold_F"] == pytest.approx(0.04, rel=1e-3)
    assert moved["W_enc_FD"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("step", "wanted"), [(0, 0.01), (49, 0.5), (99, 1.0), (799, 1.0), (800, 1.0), (900, 0.55), (1000, 0.1)]
)
def test_schedule(step: int, wanted: float) -> None:
    for component in (Adam(lr=1.0, warmup=100), Sgd(lr=1.0, warmup=100)):
        assert component.scale(Clock(step=step, total=1000)) == pytest.approx(wanted)


def test_a_later_phase_warms_up_again() -> None:
    adam = Adam(lr=1.0, warmup=100, decay=0.0)
    rates = [adam.scale(Clock(step=s, total=1000, entered=900)) for s in (900, 914, 929, 930, 999)]
    assert rates == pytest.approx([1 / 30, 0.5, 1.0, 1.0, 1.0])
    assert adam.scale(Clock(step=549, total=1000, entered=500)) == pytest.approx(0.5)


@given(
    warmup=st.integers(0, 500),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
    total=st.integers(1, 10**6),
    share=st.floats(0, 1),
)
def test_schedule_stays_in_bounds(warmup: int, decay: float, final: float, total: int, share: float) -> None:
    component = Adam(lr=1.0, warmup=warmup, decay=decay, final=final)
    scale = component.scale(Clock(step=int(share * total), total=total))
    assert 0 <= scale <= 1
    assert component.scale(Clock(step=total, total=total)) <= max(final, 1.0 if decay == 0 else final) + 1e-9


def test_without_decay_the_rate_stays() -> None:
    assert Adam(lr=1.0, warmup=1, decay=0.0).scale(Clock(step=1000, total=1000)) == 1.0


@pytest.mark.parametrize(
    ("total", "steps"), [(1, 1), (100, 20), (1000, 200), (20_000, 400), (50_000, 1000), (10**6, 1000)]
)
def test_warmup_steps(total: int, steps: int) -> None:
    assert warmup_steps(total) == steps
    for component in (Adam(lr=0.01), Sgd(lr=0.01)):
        settled = component.settle(plan(total))
        assert settled.warmup == steps
        assert settled.settle(plan(7 * total)).warmup == steps  # a longer run resumed warms up as it did
        assert {row.path: row.value for row in settled.derive(plan(total))}["optimizer.warmup"] == steps


def test_derived_rows() -> None:
    rows = {row.path: row.value for row in Adam(lr=0.01, encoder_scale=2.0).derive(plan(1000, 64))}
    assert rows["optimizer.decay_start"] == 800
    given = Adam(lr=0.01, warmup=7).derive(plan(1000))[0]
    assert (given.value, given.formula, given.origin) == (7, "as given", "optimizer.warmup")
    assert rows["optimizer.relative_step"] == pytest.approx(0.01 * 2 * 8)


def test_a_step_that_would_turn_rows_over_is_refused() -> None:
    Adam(lr=0.02).settle(plan(d_model=64))
    with pytest.raises(RecipeError, match=r"lr: one step would move a unit row .* by 0.4 .*lower lr to 0.03"):
        Adam(lr=0.05).settle(plan(d_model=64))
    with pytest.raises(RecipeError, match="encoder_scale"):
        Adam(lr=0.02, encoder_scale=5.0).settle(plan(d_model=64))


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"betas": (0.9, 1.0)}, {"decay": 1.5}, {"eps": 0.0}, {"warmup": -1}])
def test_options_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Adam(**{"lr": 0.01, **bad})  # type: ignore[arg-type]
