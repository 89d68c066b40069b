"""Streaming moments against two passes over the whole, and the gate that ends them."""

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spalf.core import tree
from spalf.engine import moments
from spalf.engine.moments import Convergence, Moments


def rows(n: int, d: int = 5, offset: float = 100.0, seed: int = 0) -> Tensor:
    """Correlated rows far from the origin."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=draw, dtype=torch.float64)
    return torch.randn(n, d, generator=draw, dtype=torch.float64) @ mixing + offset


def assert_are_moments_of(m: Moments, x_BD: Tensor) -> None:
    x = x_BD.numpy()
    assert float(m.n) == len(x)
    np.testing.assert_allclose(m.mean_D.numpy(), x.mean(0), rtol=0, atol=1e-11 * abs(x).max())
    np.testing.assert_allclose(moments.covariance(m).numpy(), np.cov(x.T, bias=True), rtol=0, atol=1e-10)


@given(cuts=st.lists(st.integers(0, 300), max_size=6))
def test_chunks_give_the_moments_of_the_whole(cuts: list[int]) -> None:
    x_BD = rows(300)
    edges = [0, *sorted(cuts), 300]
    m = moments.empty(5)
    for start, stop in itertools.pairwise(edges):
        m = moments.add(m, x_BD[start:stop])
    assert_are_moments_of(m, x_BD)


@given(a=st.integers(1, 40), b=st.integers(1, 40), c=st.integers(1, 40))
def test_merge_is_associative_and_commutes(a: int, b: int, c: int) -> None:
    x, y, z = (moments.of(rows(n, seed=n)) for n in (a, b, c))
    left = moments.merge(moments.merge(x, y), z)
    right = moments.merge(z, moments.merge(y, x))
    torch.testing.assert_close(left.mean_D, right.mean_D, rtol=1e-12, atol=0)
    torch.testing.assert_close(left.scatter_DD, right.scatter_DD, rtol=1e-9, atol=1e-9)


def test_an_offset_costs_no_digits() -> None:
    """Sum of squares minus square of sums loses all of them here."""
    x_BD = rows(4096, offset=1e6)
    m = moments.empty(5)
    for chunk in x_BD.split(512):
        m = moments.add(m, chunk)
    exact = moments.of(rows(4096, offset=0.0))
    naive_DD = x_BD.T @ x_BD / 4096 - torch.outer(x_BD.mean(0), x_BD.mean(0))
    error = (moments.covariance(m) - moments.covariance(exact)).abs().max()
    assert error < 1e-8
    assert (naive_DD - moments.covariance(exact)).abs().max() > 1e3 * error


def test_float32_rows_are_summed_in_float64() -> None:
    m = moments.of(rows(64).float().requires_grad_())
    assert {m.n.dtype, m.mean_D.dtype, m.scatter_DD.dtype} == {torch.float64}
    assert not m.mean_D.requires_grad


def collect(batches: list[Tensor], d: int = 5) -> Convergence:
    state = moments.init(d)
    for x_BD in batches:
        state = moments.update(state, x_BD)
    return state


def test_a_snapshot_is_taken_once_the_interval_has_passed() -> None:
    x_BD = rows(100)
    before = collect(list(x_BD[:24].split(4)))
    assert float(before.snapshot_n) == 0
    assert float(before.change) == 1
    after = collect(list(x_BD[:28].split(4)))
    assert float(after.snapshot_n) == 28  # 5^2 rows have passed
    torch.testing.assert_close(after.snapshot_DD, moments.covariance(moments.of(x_BD[:28])))
    assert float(after.change) == 1


def test_change_is_the_relative_frobenius_norm() -> None:
    x_BD = rows(60)
    state = collect([x_BD[:30], x_BD[30:]])
    first_DD, last_DD = moments.covariance(moments.of(x_BD[:30])), moments.covariance(moments.of(x_BD))
    torch.testing.assert_close(state.change, (last_DD - first_DD).norm() / last_DD.norm())


def test_verdict_names_what_ended_it() -> None:
    state = collect(list(rows(20_000).split(1000)))
    assert float(state.change) < 0.05
    assert moments.verdict(state, minimum=50, maximum=10**9, tolerance=0.05) == "converged"
    assert moments.verdict(state, minimum=20_001, maximum=10**9, tolerance=0.05) == ""
    assert moments.verdict(state, minimum=50, maximum=10**9, tolerance=1e-9) == ""
    assert moments.verdict(state, minimum=50, maximum=20_000, tolerance=1e-9) == "maximum"


def test_a_moving_distribution_does_not_converge() -> None:
    drifting = [x_BD * (1 + i) for i, x_BD in enumerate(rows(20_000).split(1000))]
    assert moments.verdict(collect(drifting), minimum=50, maximum=10**9, tolerance=0.05) == ""


def test_constant_rows_give_a_finite_change() -> None:
    state = collect([torch.ones(50, 5), torch.ones(50, 5)])
    assert float(state.change) == 0
    assert float(moments.covariance(state.moments).abs().max()) == 0


def test_a_saved_state_continues_exactly() -> None:
    batches = list(rows(120).split(10))
    state = collect(batches[:5])
    poured = tree.restore(moments.init(5), tree.flatten(state))
    for x_BD in batches[5:]:
        state, poured = moments.update(state, x_BD), moments.update(poured, x_BD)
    a, b = tree.flatten(state), tree.flatten(poured)
    assert a.keys() == b.keys()
    assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_sizes() -> None:
    assert (moments.interval(64), moments.interval(4096)) == (4096, 1_000_000)
    assert moments.least_rows(512) == 5120
