"""Phase `pam`: the slot's checks, its turns, and that what it writes is the decoder that solves for its codes.

Shape letters: N collected rows, D d_model, F features.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from spalf_pam.phase import Pam, PamState
from spalf_pam.solver import Decoder
from spalf_pam.write import can_fold, write_
from torch import Tensor

from spalf import Clock, Plan, Reading, RecipeError, RunError, TrainingState, White
from spalf.testing import conform, started, toy_plan

KINDS = {
    "jumprelu": {"phase.pam.terms": '["l0"]'},
    "relu": {"activation": '{ use = "relu" }', "phase.pam.l1": "0.1"},
    "topk": {"activation": '{ use = "topk" }', "stratum.free.unit_norm": "false"},
    "topk_pre_bias": {"activation": '{ use = "topk", pre_bias = true }', "stratum.free.unit_norm": "false"},
    "batch_topk": {"activation": '{ use = "batch_topk" }', "stratum.free.unit_norm": "false"},
}
EXACT = ["jumprelu", "relu"]
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("check", conform(Pam))
def test_conforms(check: Any) -> None:
    check()


def plan_of(kind: str = "jumprelu", **options: str) -> Plan:
    """100 steps of 128 rows, F = 64: a solve every four steps unless `options` say otherwise."""
    sets = {"phases": '["calibrate", "pam"]', "constraint": "{}", "phase.pam.use": '"pam"', **KINDS[kind]}
    given_ = {"encoder_steps": "2", "rows": "256", "weight": "0.05", **options}
    sets |= {f"phase.pam.{key}": value for key, value in given_.items()}
    return toy_plan(**{key.replace(".", "__"): value for key, value in sets.items()})


def step(plan: Plan, state: TrainingState) -> Reading:
    reading: Reading = plan.recipe.phase["pam"].step(plan, state)
    return reading


def recorded(state: TrainingState) -> list[Tensor]:
    """A list that takes every batch that `state` is given from now on."""
    seen: list[Tensor] = []
    given_next = state.stream.next

    def take(n: int) -> Any:
        batch = given_next(n)
        seen.append(batch.x_BD)
        return batch

    state.stream.next = take  # type: ignore[method-assign]
    return seen


# --------------------------------------------------------------------------------------------------------- turns
PLAN = toy_plan()


@settings(deadline=None, derandomize=True, max_examples=100)
@given(encoder=st.integers(1, 9), window=st.integers(1, 9), cycles=st.integers(1, 5), spare=st.integers(0, 17))
def test_turns_of_a_window(encoder: int, window: int, cycles: int, spare: int) -> None:
    """The last step solves; every solve follows its own whole window, that one `encoder_steps` or more."""
    spare %= encoder + window
    phase = Pam(encoder_steps=encoder, rows=window * 128)
    total = cycles * (encoder + window) + spare
    clock = Clock(total=10 + total, step=10, entered=10)
    turns = [phase.turn(PLAN, evolve(clock, step=10 + i)) for i in range(total)]
    assert all(turn.encode != turn.collect for turn in turns)
    letters = "".join("s" if t.solve else "c" if t.collect else "e" for t in turns)
    assert letters == "e" * spare + ("e" * encoder + "c" * (window - 1) + "s") * cycles
    late = phase.turn(PLAN, evolve(clock, step=10 + total))
    assert (late.encode, late.collect, late.solve) == (False, True, False)


@pytest.mark.parametrize("total", [1, 7, 20])
def test_turns_of_decaying_sums(total: int) -> None:
    phase = Pam(encoder_steps=5, accumulate="decay")
    turns = [phase.turn(PLAN, Clock(total=total, step=i)) for i in range(total)]
    assert all(turn.encode and turn.collect for turn in turns)
    assert [i for i, turn in enumerate(turns) if turn.solve] == [i for i in range(total) if (total - 1 - i) % 5 == 0]


def test_a_share_of_the_budget() -> None:
    plan = plan_of(share="0.5")
    state = started(plan, 49)
    phase = plan.recipe.phase["pam"]
    assert not phase.done(plan, state)
    assert "solve.live" in step(plan, state).values
    assert phase.done(plan, state)


# ------------------------------------------------------------------------------------------------------ the solve
@each_kind
def test_the_decoder_solves_for_the_codes_that_it_gets(kind: str) -> None:
    """Normal equations of the collected rows, with codes of the autoencoder as it is after the solve and the fold."""
    plan = plan_of(kind, ridge="0.0", rows="1024", l1="0.0")
    state = started(plan, 0)
    rows = recorded(state)
    while "solve.live" not in step(plan, state).values:
        pass
    white_ND = state.metric.white(torch.cat(rows[-8:]))  # type: ignore[arg-type]
    code = state.sae.encode(white_ND)
    error_ND = (white_ND - state.sae.decode(code)).detach().double()
    z_NF = code.dense().detach().double()
    cosine_FD = z_NF.T @ error_ND / (z_NF.norm(dim=0)[:, None] * error_ND.norm(dim=0)).clamp(min=1e-9)
    assert float(cosine_FD.abs().max()) < 2e-5
    assert float(error_ND.mean(0).abs().max()) < 1e-5
    assert float(error_ND.square().mean()) > 0.01, "fitted exactly: the equations say nothing"


@each_kind
def test_no_solve_raises_the_error_of_its_rows(kind: str) -> None:
    plan = plan_of(kind, ridge="0.0", rows="512", l1="0.0")
    state = started(plan, 0)
    solves = [r.values for r in (step(plan, state) for _ in range(100)) if "solve.live" in r.values]
    assert len(solves) == 16  # 100 steps, 6 a turn
    assert all(float(s["solve.error_after"]) <= float(s["solve.error_before"]) for s in solves)
    assert float(solves[-1]["solve.error_after"]) < 0.9 * float(solves[0]["solve.error_before"])
    own: PamState = state.phase
    assert own.solves == 16
    assert float(own.sums.count) == 512


@each_kind
def test_the_sums_follow_the_fold(kind: str) -> None:
    """What the sums say of the decoder that was just written is what its reconstructions of the rows say."""
    plan = plan_of(kind, rows="512")
    state = started(plan, 0)
    rows = recorded(state)
    while "solve.live" not in step(plan, state).values:
        pass
    white_ND = state.metric.white(torch.cat(rows[-4:]))  # type: ignore[arg-type]
    error = (white_ND - state.sae.decode(state.sae.encode(white_ND))).square().sum()
    w_FD = state.sae.log_gain.exp() * state.sae.W_dec_FD
    torch.testing.assert_close(state.phase.sums.error(w_FD, state.sae.b_dec_D).float(), error, rtol=1e-4, atol=1e-3)


def test_the_encoder_keeps_its_scale_under_a_penalty_that_shrinks_codes() -> None:
    """The penalty shrinks codes and the solve makes up for it: without a balance the encoder would run to zero."""
    state = started(plan_of("relu", l1="0.5", ridge="0.0"), 100)
    assert state.phase.solves == 25
    assert abs(float(state.sae.W_enc_FD.detach().norm(dim=1).log().mean())) < 1e-5


@pytest.mark.parametrize("space", ["raw", "white"])
def test_a_solve_counts_the_penalty_on_codes(space: str) -> None:
    """Error plus penalty of the window's rows, measured from the outside, falls at a solve."""
    plan = plan_of("relu", l1="0.3", ridge="0.0", rows="1024", space=f'"{space}"')
    state = started(plan, 0)
    rows = recorded(state)
    phase: Any = plan.recipe.phase["pam"]

    @torch.no_grad()
    def objective() -> float:
        x_ND = torch.cat(rows[-8:])
        white_ND = state.metric.white(x_ND)  # type: ignore[arg-type]
        code = state.sae.encode(white_ND)
        error_ND, w_FD = white_ND - state.sae.decode(code), state.sae.log_gain.exp() * state.sae.W_dec_FD
        if space == "raw":
            error_ND, w_FD = state.metric.raw_direction(error_ND), state.metric.raw_direction(w_FD)  # type: ignore
        variance = state.metric.variance(space)
        penalty = (code.dense() @ w_FD.norm(dim=1)).mean() / variance.sqrt()
        return float(error_ND.square().sum(1).mean() / variance + 0.3 * penalty)

    for _ in range(5):
        while not phase.turn(plan, state.clock).solve:
            step(plan, state)
        before = {name: value.clone() for name, value in state.sae.state_dict().items()}
        step(plan, state)
        after = {name: value.clone() for name, value in state.sae.state_dict().items()}
        solved = objective()
        state.sae.load_state_dict(before)
        assert solved < objective()
        state.sae.load_state_dict(after)


def test_conjugate_gradients_take_the_same_way() -> None:
    ends = []
    for solver in ("cholesky", "cg"):
        plan = plan_of(solver=f'"{solver}"')
        state = started(plan, 20)
        ends.append(state.sae.W_dec_FD.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)


def test_dead_features_keep_their_direction_and_code() -> None:
    plan = plan_of(proximity="0.0")
    state = started(plan, 0)
    state.sae.b_enc_F.data[:3] = -100.0
    before_FD, bias_F = state.sae.W_dec_FD.detach().clone(), state.sae.b_enc_F.detach().clone()
    while "solve.live" not in (values := step(plan, state).values):
        pass
    assert float(values["solve.live"]) == 61 / 64
    torch.testing.assert_close(state.sae.W_dec_FD[:3], before_FD[:3])
    assert bool((state.sae.b_enc_F[:3] < 0.01 * bias_F[:3]).all())


# ---------------------------------------------------------------------------------------------- what a fold leaves
def looked(state: TrainingState) -> tuple[Tensor, Tensor]:
    """(gates, reconstruction) of 512 held-out rows."""
    white_BD = state.metric.white(state.stream.held_out().next(512).x_BD)
    code = state.sae.encode(White(white_BD))
    return code.scatter(code.gate_BK).detach(), state.sae.decode(code).detach()


@each_kind
def test_writing_changes_no_reconstruction_but_by_the_decoder(kind: str) -> None:
    """A dictionary with rows of other lengths is written as it stands: same gates, same reconstructions."""
    plan = plan_of(kind)
    state = started(plan, 3)
    sae = state.sae
    sae.W_dec_FD.data.mul_(torch.linspace(0.3, 3.0, 64)[:, None])
    gates_BF, hat_BD = looked(state)
    same = Decoder(
        w_FD=(sae.log_gain.exp() * sae.W_dec_FD).detach().double(),
        b_D=sae.b_dec_D.detach().double(),
        live_F=torch.ones(64, dtype=torch.bool),
        residual=torch.zeros(()),
    )
    c_F = write_(state.learner, same)
    after_BF, hat_after_BD = looked(state)
    assert float((gates_BF != after_BF).double().mean()) < 1e-4, "beyond what rounding at a threshold explains"
    torch.testing.assert_close(hat_after_BD, hat_BD, rtol=1e-4, atol=1e-3)
    assert can_fold(sae.activator) == (kind in EXACT)
    if kind in EXACT:
        torch.testing.assert_close(sae.W_dec_FD.norm(dim=1), torch.ones(64))
        assert abs(float(sae.W_enc_FD.detach().norm(dim=1).log().mean())) < 1e-5
    else:
        assert bool((c_F == 1).all())


@each_kind
def test_a_moved_bias_moves_no_code(kind: str) -> None:
    plan = plan_of(kind)
    state = started(plan, 3)
    gates_BF, hat_BD = looked(state)
    moved = Decoder(
        w_FD=(state.sae.log_gain.exp() * state.sae.W_dec_FD).detach().double(),
        b_D=state.sae.b_dec_D.detach().double() + 0.5,
        live_F=torch.ones(64, dtype=torch.bool),
        residual=torch.zeros(()),
    )
    write_(state.learner, moved)
    after_BF, hat_after_BD = looked(state)
    assert float((gates_BF != after_BF).double().mean()) < 1e-4
    torch.testing.assert_close(hat_after_BD, hat_BD + 0.5, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ the encoder
@each_kind
def test_an_encoder_step_moves_the_encoder_alone(kind: str) -> None:
    plan = plan_of(kind)
    state = started(plan, 4)
    before = {name: p.detach().clone() for name, p in state.sae.named_parameters()}
    assert "solve.live" not in step(plan, state).values
    decoder = {"W_dec_FD", "b_dec_D", "log_gain"}
    for name, parameter in state.sae.named_parameters():
        if name in decoder:  # a unit row may be divided by its length once more
            torch.testing.assert_close(parameter.detach(), before[name], rtol=1e-6, atol=1e-7)
            assert parameter.requires_grad
        elif name in ("W_enc_FD", "b_enc_F"):
            assert not torch.equal(parameter.detach(), before[name])
    moments = {path.split(".")[1] for path in state.learner.state_dict() if path.startswith("optimizer.")}
    assert moments.isdisjoint(decoder)
    assert not state.sae.training


def test_the_proximal_term_holds_the_encoder_back() -> None:
    moved = []
    for proximity in ("0.0", "100.0"):
        plan = plan_of(proximity=proximity, encoder_steps="10")
        state = started(plan, 0)
        before_FD = state.sae.W_enc_FD.detach().clone()
        for _ in range(10):
            step(plan, state)
        moved.append(float((state.sae.W_enc_FD.detach() - before_FD).norm()))
    assert moved[1] < 0.7 * moved[0]


@each_kind
@pytest.mark.parametrize("accumulate", ["window", "decay"])
def test_it_learns(kind: str, accumulate: str) -> None:
    plan = plan_of(kind, accumulate=f'"{accumulate}"', rows="640", encoder_steps="5")
    state = started(plan, 0)
    r2 = [float(step(plan, state).values["r2_raw"]) for _ in range(100)]
    assert sum(r2[-5:]) / 5 > sum(r2[:5]) / 5 + 0.1
    assert plan.recipe.phase["pam"].done(plan, state)


def test_decaying_sums_hold_the_rows_asked_for() -> None:
    plan = plan_of(accumulate='"decay"', rows="640", encoder_steps="5")
    state = started(plan, 60)
    assert abs(float(state.phase.sums.count) - 640) < 1


def test_a_term_without_a_gradient_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "relu", {"activation": '{ use = "relu" }', "phase.pam.terms": '["l0"]'})
    plan = plan_of("relu")
    with pytest.raises(RunError, match=r'phase\.pam\.terms: "l0" depends on no parameter of the encoder'):
        started(plan, 1)


# ------------------------------------------------------------------------------------------------------ before a run
def problem(kind: str, **options: str) -> str:
    with pytest.raises(RecipeError) as caught:
        plan_of(kind, **options)
    return str(caught.value)


def test_a_phase_too_short_for_a_solve_is_refused() -> None:
    assert problem("jumprelu", rows="20000") == (
        "phase.pam: a solve takes 159 steps (encoder_steps, and rows / budget.batch), the phase has 100 "
        "(raise budget.tokens, or lower rows or encoder_steps)"
    )


def test_lengths_that_a_stratum_would_undo_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "topk", {"activation": '{ use = "topk" }'})
    assert "stratum.free.unit_norm: would undo the decoder's lengths" in problem("topk")


def test_a_bias_that_cannot_move_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = {"activation": '{ use = "gated", pre_bias = true }', "stratum.free.unit_norm": "false"}
    monkeypatch.setitem(KINDS, "gated", gated)
    assert "phase.pam: cannot move b_dec" in problem("gated")


def test_derived_numbers() -> None:
    rows = {row.path: row for row in plan_of(rows="0").derived}
    assert (rows["phase.pam.rows"].value, rows["phase.pam.rows"].formula) == (640, "10 F")
    assert rows["phase.pam.steps_per_solve"].value == 2 + 5
    assert rows["phase.pam.sums.GiB"].value == 8 * 64**2 / 2**30
