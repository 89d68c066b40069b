"""Streaming mean and covariance in float64, and the gate that ends their collection.

All functions are pure, and both records are made of tensors only, so a half-finished calibration is checkpointable
state. Shape letters: B rows, D d_model.
"""

from __future__ import annotations

from typing import Literal

import torch
from attrs import evolve, frozen
from torch import Tensor

Verdict = Literal["", "converged", "maximum"]


@frozen(kw_only=True, eq=False)
class Moments:
    """Count, mean [D] and scatter sum (x - mean)(x - mean)' [D, D] of the rows seen so far, all float64."""

    n: Tensor
    mean_D: Tensor
    scatter_DD: Tensor


def empty(d: int) -> Moments:
    """Moments of no rows of width `d`, on the CPU: the first rows that are merged in bring their device."""
    mean_D = torch.zeros(d, dtype=torch.float64)
    return Moments(n=mean_D.new_zeros(()), mean_D=mean_D, scatter_DD=mean_D.new_zeros((d, d)))


def of(x_BD: Tensor) -> Moments:
    """Moments of the rows of one batch, in two passes, on its device."""
    x_BD = x_BD.detach().to(torch.float64)
    n = torch.tensor(float(x_BD.shape[0]), dtype=torch.float64, device=x_BD.device)
    mean_D = x_BD.sum(0) / n.clamp(min=1)
    centred_BD = x_BD - mean_D
    return Moments(n=n, mean_D=mean_D, scatter_DD=centred_BD.T @ centred_BD)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the rows of both, on `b`'s device (Chan's pairwise form of Welford's recursion)."""
    device = b.n.device
    n_a, mean_D, scatter_DD = a.n.to(device), a.mean_D.to(device), a.scatter_DD.to(device)
    n = n_a + b.n
    share = b.n / n.clamp(min=1)
    delta_D = b.mean_D - mean_D
    # Q = Q_a + Q_b + delta delta' n_a n_b / n: no square of a mean is ever formed, so a large offset costs no digits.
    scatter_DD = torch.addr(scatter_DD + b.scatter_DD, delta_D, delta_D * (n_a * share))
    return Moments(n=n, mean_D=mean_D + delta_D * share, scatter_DD=scatter_DD)


def add(m: Moments, x_BD: Tensor) -> Moments:
    """`m` with the rows of a batch merged in."""
    return merge(m, of(x_BD))


def covariance(m: Moments) -> Tensor:
    """S = scatter / n, float64 [D, D]; zero where nothing was seen."""
    return m.scatter_DD / m.n.clamp(min=1)


@frozen(kw_only=True, eq=False)
class Convergence:
    """Moments, the covariance at the last snapshot, the rows seen by then, and the change between the last two.

    `change` is ||S_t - S_(t - interval)|| / ||S_t||, Frobenius; 1 before the first snapshot, as S was zero at t = 0.
    """

    moments: Moments
    snapshot_DD: Tensor
    snapshot_n: Tensor
    change: Tensor


def interval(d: int) -> int:
    """Rows between snapshots: min(d^2, 10^6)."""
    return min(d * d, 1_000_000)


def least_rows(d: int) -> int:
    """Fewest rows that a covariance of width `d` may rest on: 10 d."""
    return 10 * d


def init(d: int) -> Convergence:
    """Nothing seen."""
    moments = empty(d)
    return Convergence(
        moments=moments,
        snapshot_DD=torch.zeros_like(moments.scatter_DD),
        snapshot_n=torch.zeros_like(moments.n),
        change=torch.ones_like(moments.n),
    )


def update(state: Convergence, x_BD: Tensor) -> Convergence:
    """Merge a batch [B, D] in; snapshot once `interval` rows have passed since the last. Waits for the device."""
    moments = add(state.moments, x_BD)
    if float(moments.n) - float(state.snapshot_n) < interval(moments.mean_D.shape[0]):
        return evolve(state, moments=moments)
    covariance_DD = covariance(moments)
    moved = torch.linalg.matrix_norm(covariance_DD - state.snapshot_DD.to(covariance_DD.device))
    size = torch.linalg.matrix_norm(covariance_DD)
    change = moved / size.clamp(min=torch.finfo(torch.float64).tiny)
    return Convergence(moments=moments, snapshot_DD=covariance_DD, snapshot_n=moments.n, change=change)


def verdict(state: Convergence, minimum: int, maximum: int, tolerance: float) -> Verdict:
    """Why collection may end: the change fell below `tolerance` after `minimum` rows, or `maximum` rows were seen.

    The change shrinks with interval / n even on independent rows: it says how far averaging has come, and is no test
    of stationarity. Waits for the device.
    """
    n = float(state.moments.n)
    if n >= minimum and float(state.change) < tolerance:
        return "converged"
    return "maximum" if n >= maximum else ""
