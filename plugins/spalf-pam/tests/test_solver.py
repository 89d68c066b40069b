"""The decoder in closed form: against stacked least squares, streamed, by both methods, and near rows = features."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spalf_pam.solver import Decoder, Penalties, conjugate_gradients, majorant, solve
from spalf_pam.sums import Sums, empty
from torch import Tensor

from spalf import RunError

N, F, D = 60, 12, 5


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(seed: int = 0, n: int = N, width: int = F) -> tuple[Tensor, Tensor]:
    """Sparse codes and targets far from zero mean, so that a bias fitted after the weights would be wrong."""
    return (draw(seed, n, width) + 0.3).clamp(min=0), draw(seed + 1, n, D) + 4.0


def summed(z_BF: Tensor, y_BD: Tensor) -> Sums:
    return empty(z_BF.shape[1], y_BD.shape[1]).add_(z_BF, y_BD)


def stacked(z_NF: Tensor, y_ND: Tensor, w_t: Tensor, b_t: Tensor, a: float, m: float, beta: float, n: float) -> Decoder:
    """The same minimum as one least-squares problem with a row for every summand of the objective."""
    width, d = z_NF.shape[1], y_ND.shape[1]
    eye_FF = torch.eye(width, dtype=torch.float64)
    last_F1, one = torch.zeros(width, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    ones_N1 = torch.ones(len(z_NF), 1, dtype=torch.float64)
    left = [torch.cat([z_NF, ones_N1], 1), torch.cat([a**0.5 * eye_FF, last_F1], 1)]
    left += [torch.cat([m**0.5 * eye_FF, last_F1], 1)]
    left += [torch.cat([torch.zeros(1, width, dtype=torch.float64), x**0.5 * one], 1) for x in (beta, n)]
    right = [y_ND, torch.zeros(width, d, dtype=torch.float64), m**0.5 * w_t]
    right += [torch.zeros(1, d, dtype=torch.float64), n**0.5 * b_t[None]]
    both = torch.linalg.lstsq(torch.cat(left), torch.cat(right), driver="gelsd").solution
    return Decoder(w_FD=both[:-1], b_D=both[-1], live_F=torch.ones(width) > 0, residual=torch.zeros(()))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    ridge=st.floats(1e-4, 1.0),
    damping=st.floats(0.0, 1.0),
    bias_ridge=st.floats(0.0, 1.0),
    bias_damping=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_it_is_the_joint_minimum(
    ridge: float, damping: float, bias_ridge: float, bias_damping: float, seed: int
) -> None:
    z_NF, y_ND = rows(seed)
    w_t, b_t = draw(seed + 2, F, D), draw(seed + 3, D)
    sums = summed(z_NF, y_ND)
    unit = float(sums.scale())
    penalties = Penalties(ridge=ridge, damping=damping, bias_ridge=bias_ridge, bias_damping=bias_damping)
    found = solve(sums, w_t, b_t, penalties)
    expected = stacked(z_NF, y_ND, w_t, b_t, ridge * unit, damping * unit, bias_ridge * N, bias_damping * N)
    torch.testing.assert_close(found.w_FD, expected.w_FD, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.b_D, expected.b_D, rtol=1e-10, atol=1e-10)
    assert float(found.residual) < 1e-13


def test_the_unit_of_a_relative_ridge() -> None:
    """tr of the centred Gram matrix over the features that fire."""
    z_NF, y_ND = rows()
    z_NF[:, 3] = 0.0
    centred_NF = z_NF - z_NF.mean(0)
    torch.testing.assert_close(summed(z_NF, y_ND).scale(), (centred_NF.T @ centred_NF).trace() / (F - 1))


def test_weights_then_bias_is_worse() -> None:
    z_NF, y_ND = rows()
    both = solve(summed(z_NF, y_ND), torch.zeros(F, D), torch.zeros(D), Penalties(ridge=0.0))
    w_FD = torch.linalg.lstsq(z_NF, y_ND).solution
    one_after_the_other = (y_ND - z_NF @ w_FD - (y_ND - z_NF @ w_FD).mean(0)).square().sum()
    assert float((y_ND - z_NF @ both.w_FD - both.b_D).square().sum()) < 0.95 * float(one_after_the_other)


def test_a_stream_is_the_whole() -> None:
    z_NF, y_ND = rows()
    streamed, whole = empty(F, D), summed(z_NF, y_ND)
    for z_BF, y_BD in zip(z_NF.split(7), y_ND.split(7), strict=True):
        streamed.add_(z_BF, y_BD)
    w_t, b_t, penalties = draw(2, F, D), draw(3, D), Penalties(ridge=0.01, damping=0.1)
    a, b = solve(streamed, w_t, b_t, penalties), solve(whole, w_t, b_t, penalties)
    torch.testing.assert_close(a.w_FD, b.w_FD, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(a.b_D, b.b_D, rtol=1e-11, atol=1e-12)


def test_decay_weighs_a_batch_by_its_age() -> None:
    z_NF, y_ND = rows()
    decayed = empty(F, D)
    for z_BF, y_BD in zip(z_NF.split(20), y_ND.split(20), strict=True):
        decayed.add_(z_BF, y_BD, decay=0.5)
    weight_N1 = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64).repeat_interleave(20)[:, None]
    torch.testing.assert_close(decayed.G_FF, z_NF.T @ (weight_N1 * z_NF))
    torch.testing.assert_close(decayed.H_FD, z_NF.T @ (weight_N1 * y_ND))
    assert float(decayed.count) == 20 * 1.75


def test_the_error_without_the_rows() -> None:
    z_NF, y_ND = rows()
    w_FD, b_D = draw(2, F, D), draw(3, D)
    torch.testing.assert_close(summed(z_NF, y_ND).error(w_FD, b_D), (y_ND - z_NF @ w_FD - b_D).square().sum())


def test_rescaled_sums_are_those_of_rescaled_codes() -> None:
    z_NF, y_ND = rows()
    c_F = torch.linspace(0.5, 2.0, F)
    rescaled, direct = summed(z_NF, y_ND).rescale_(c_F), summed(z_NF * c_F, y_ND)
    for mine, theirs in zip(rescaled._all(), direct._all(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_step_of_the_decoder_raises_its_objective() -> None:
    """Damped or not: the error falls from where the decoder stood, as the proximal term is zero there."""
    z_NF, y_ND = rows()
    sums = summed(z_NF, y_ND)
    w_FD, b_D = torch.zeros(F, D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    errors = [float(sums.error(w_FD, b_D))]
    for _ in range(20):
        new = solve(sums, w_FD, b_D, Penalties(ridge=0.0, damping=1.0, bias_damping=1.0))
        w_FD, b_D = new.w_FD, new.b_D
        errors.append(float(sums.error(w_FD, b_D)))
    assert all(after < before for before, after in pairwise(errors))
    least = solve(sums, w_FD, b_D, Penalties(ridge=0.0))
    assert errors[-1] - float(sums.error(least.w_FD, least.b_D)) < 0.01 * errors[0]


@pytest.mark.parametrize("method", ["cholesky", "cg"])
def test_a_penalty_on_lengths_is_minimised_by_repeated_solves(method: str) -> None:
    """Error + weight * sum_i s_i ||w_i|| never rises, and ends where its gradient is 0; a strong one empties rows."""
    z_NF, noise_ND = rows(n=200)
    y_ND = z_NF[:, : F // 2] @ draw(5, F // 2, D) + 0.1 * noise_ND
    sums, weight = summed(z_NF, y_ND), 0.2
    w_FD, b_D = solve(sums, torch.zeros(F, D), torch.zeros(D), Penalties(ridge=0.0)).w_FD, y_ND.mean(0)

    def objective() -> float:
        return float(sums.error(w_FD, b_D) + weight * sums.s_F @ w_FD.norm(dim=1))

    values = [objective()]
    for _ in range(200):
        found = solve(sums, w_FD, b_D, Penalties(ridge=0.0), method, majorant(sums, w_FD.norm(dim=1), weight))
        w_FD, b_D = found.w_FD, found.b_D
        values.append(objective())
    assert all(after <= before + 1e-9 * values[0] for before, after in pairwise(values))
    length_F = w_FD.norm(dim=1)
    full_F = length_F > 1e-2
    assert 0 < int(full_F.sum()) < F
    gradient_FD = -2 * z_NF.T @ (y_ND - z_NF @ w_FD - b_D) + weight * sums.s_F[:, None] * w_FD / length_F[:, None]
    assert float(gradient_FD[full_F].abs().max()) < 1e-2 * weight * float(sums.s_F.mean())


@pytest.mark.parametrize("method", ["cholesky", "cg"])
def test_dead_columns_keep_their_row(method: str) -> None:
    z_NF, y_ND = rows()
    z_NF[:, [2, 7]] = 0.0
    w_t = draw(2, F, D)
    sums = summed(z_NF, y_ND)
    found = solve(sums, w_t, torch.zeros(D), Penalties(ridge=0.0, damping=0.0), method)
    live = [j for j in range(F) if j not in (2, 7)]
    assert found.live_F.tolist() == [j in live for j in range(F)]
    torch.testing.assert_close(found.w_FD[[2, 7]], w_t[[2, 7]])
    others = solve(summed(z_NF[:, live], y_ND), w_t[live], torch.zeros(D), Penalties(ridge=0.0, damping=0.0), method)
    torch.testing.assert_close(found.w_FD[live], others.w_FD, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.b_D, others.b_D, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("penalties", [Penalties(ridge=0.01), Penalties(ridge=0.1, damping=0.5, bias_damping=0.2)])
def test_conjugate_gradients_agree_with_cholesky(penalties: Penalties) -> None:
    width = 96
    z_NF, y_ND = rows(n=5 * width, width=width)
    w_t, b_t, sums = draw(2, width, D), draw(3, D), summed(z_NF, y_ND)
    factor, iterated = (solve(sums, w_t, b_t, penalties, method) for method in ("cholesky", "cg"))
    torch.testing.assert_close(iterated.w_FD, factor.w_FD, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(iterated.b_D, factor.b_D, rtol=1e-8, atol=1e-9)


def test_conjugate_gradients_from_the_solution_are_done() -> None:
    A_FF = draw(0, F, F)
    A_FF = A_FF @ A_FF.T + torch.eye(F, dtype=torch.float64)
    x_FD, calls = draw(1, F, D), []

    def times(v_FD: Tensor) -> Tensor:
        calls.append(1)
        return A_FF @ v_FD

    found, left = conjugate_gradients(times, A_FF.diagonal(), A_FF @ x_FD, x_FD)
    assert len(calls) == 1
    assert left < 1e-12
    assert torch.equal(found, x_FD)


def test_a_singular_system_is_told() -> None:
    z_NF, y_ND = rows()
    z_NF[:, 1] = z_NF[:, 0]
    with pytest.raises(RunError, match=r"singular.*raise ridge"):
        solve(summed(z_NF, y_ND), torch.zeros(F, D), torch.zeros(D), Penalties(ridge=0.0))


def test_slow_conjugate_gradients_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spalf_pam.solver.ITERATIONS", 1)
    monkeypatch.setattr("spalf_pam.solver.conjugate_gradients.__defaults__", (1e-10, 1))
    z_NF, y_ND = rows()
    with pytest.raises(RunError, match="after 1 steps"):
        solve(summed(z_NF, y_ND), torch.zeros(F, D), torch.zeros(D), Penalties(ridge=0.0), "cg")


def test_nothing_summed_is_told() -> None:
    with pytest.raises(RunError, match="no codes"):
        solve(empty(F, D), torch.zeros(F, D), torch.zeros(D), Penalties())


# ------------------------------------------------------------------------------------------------ rows and features
def planted(n: int, seed: int) -> Tensor:
    """Rows of 32 dimensions: 6 of 64 directions, and noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(draw(99, 64, 32), dim=1)
    on = torch.rand(n, 64, generator=generator, dtype=torch.float64) < 0.1
    size = torch.rand(n, 64, generator=generator, dtype=torch.float64) + 0.5
    noise = torch.randn(n, 32, generator=generator, dtype=torch.float64)
    return (on * size) @ directions + 0.1 * noise + 1.0


def relu(p_BF: Tensor) -> Tensor:
    return p_BF.clamp(min=0)


def top8(p_BF: Tensor) -> Tensor:
    kept = p_BF.topk(8, dim=1)
    return torch.zeros_like(p_BF).scatter(1, kept.indices, kept.values.clamp(min=0))


RATIOS = (0.25, 0.5, 0.9, 1.0, 1.1, 2.0, 5.0)


def errors_by_ratio(ridge: float, code: Callable[[Tensor], Tensor]) -> dict[float, float]:
    """Mean squared error on fresh rows by rows / features, the median of 5 random encoders."""
    width, out = 128, {}
    for ratio in RATIOS:
        errors = []
        for seed in range(5):
            e_FD = torch.nn.functional.normalize(draw(7 + seed, width, 32), dim=1)
            x_ND, new_ND = planted(round(ratio * width), 2 * seed), planted(512, 2 * seed + 1)
            mean_D = x_ND.mean(0)
            z_NF, znew_NF = (code((x - mean_D) @ e_FD.T) for x in (x_ND, new_ND))
            new = solve(summed(z_NF, x_ND), torch.zeros(width, 32), torch.zeros(32), Penalties(ridge=ridge))
            errors.append(float((new_ND - znew_NF @ new.w_FD - new.b_D).square().mean()))
        out[ratio] = sorted(errors)[2]
    return out


@pytest.mark.parametrize("code", [relu, top8])
@pytest.mark.parametrize("ridge", [1e-10, 1e-2, 1e-1])
def test_the_peak_where_rows_equal_features(ridge: float, code: Callable[[Tensor], Tensor]) -> None:
    """Double descent with a vanishing ridge, the rest of it at 1e-2, none at 1e-1, the default."""
    error = errors_by_ratio(ridge, code)
    if ridge == 1e-10:
        assert max(error, key=lambda r: error[r]) in (0.9, 1.0, 1.1)
        assert max(error.values()) > 3 * max(error[0.25], error[5.0])
    elif ridge == 1e-2:
        assert max(error.values()) < 2.2 * max(error[0.25], error[5.0])
    else:
        assert all(error[b] < 1.02 * error[a] for a, b in pairwise(RATIOS))
        assert error[5.0] < 0.7 * error[0.25]
