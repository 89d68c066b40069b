"""The bank: sixteen problems, each with one trouble that multipliers meet in training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spalf.bench.control_plants import F64, Ball, Linear, Plant, Rate
from spalf.bench.control_sparse import Dictionary, Thresholds


def _v(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def _rows(cosines: list[list[float]], n: int) -> Tensor:
    """Unit rows [M, n] with these pairwise cosines, spread over all axes by a cosine transform."""
    k, i = torch.arange(len(cosines)).double()[:, None], torch.arange(n).double()[None]
    basis = torch.cos(math.pi * k * (2 * i + 1) / (2 * n)) * math.sqrt(2.0 / n)
    basis[0] /= math.sqrt(2.0)
    rows: Tensor = torch.linalg.cholesky(torch.tensor(cosines, dtype=F64)) @ basis
    return rows


def _triangle(step: int) -> float:
    """1, up to 2 in the middle of the run and back to .6: an optimum that drifts one way, then the other."""
    return 1.0 + step / 1000.0 if step < 1000 else 2.0 - 1.4 * (step - 1000) / 1000.0


def _single(name: str, says: str, **options: Any) -> Linear:
    """min x^2 - 2x, x <= 0: one variable whose multiplier is 2."""
    given = {"h_N": _v(2.0), "J_MN": _v(1.0)[None], "lam_M": _v(2.0), "slack_M": _v(0.0), **options}
    return Linear(name=name, says=says, **given)


def _coupled(name: str, says: str, **options: Any) -> Linear:
    """Three correlated constraints of which two bind."""
    rows = _rows([[1.0, 0.59, 0.72], [0.59, 1.0, 0.86], [0.72, 0.86, 1.0]], 6)
    lam_M, slack_M = _v(1.2, 0.8, 0.0), _v(0.0, 0.0, 0.5)
    h_N = _v(1.0, 2.0, 3.0, 5.0, 8.0, 12.0)
    return Linear(name=name, says=says, h_N=h_N, J_MN=rows, lam_M=lam_M, slack_M=slack_M, **options)


def bank() -> tuple[Plant, ...]:
    """In the order of the tables; even places are for tuning, odd ones are held back."""
    return (
        _single("scalar", "one variable, exact violations", adam=False, noise=0.0),
        Linear(
            name="active and slack",
            says="two constraints bind, one does not",
            adam=False,
            h_N=_v(1.0, 2.0, 4.0),
            J_MN=torch.eye(3, dtype=F64),
            lam_M=_v(0.2, 3.0, 0.0),
            slack_M=_v(0.0, 0.0, 0.4),
        ),
        _coupled("coupled", "three correlated constraints", adam=False),
        _single(
            "ill-conditioned",
            "curvatures from .5 to 500",
            adam=False,
            lr=0.002,
            h_N=_v(0.5, 5.0, 50.0, 500.0),
            J_MN=torch.full((1, 4), 0.5, dtype=F64),
            lam_M=_v(1.5),
        ),
        _coupled("noisy", "batch noise of .1 in every violation", adam=False, noise=0.1),
        _coupled("momentum", "Adam at 5e-3", lr=0.005),
        _single("dead time", "violations arrive 100 steps late", delay=100, adam=False),
        Ball(name="falling rate", says="step noise in g, rate to 0", decay=0.3, final=0.0, lr=0.02, shake=6.0),
        _single("drift", "lam* from 1.5 to 3 to .9", course=_triangle, lam_M=_v(1.5)),
        _single("gain x 10", "curvature falls to a tenth in the middle", adam=False, stiffness=_soft),
        _coupled("enters late", "switched on at step 700", enters=700, judged=700),
        Rate(name="rate by sigmoid", says="non-convex, 64 of 512 points per batch", noise=0.0),
        _single("out of reach", "infeasible until step 600", lift=_lifted, reach=1.0, judged=600),
        Thresholds(name="error budget", says="JumpReLU, rate to 2 %", noise=0.0, decay=0.3, final=0.02),
        Thresholds(name="count budget", says="the same data, error under a count", noise=0.0, rate=True, begin=0.5),
        Dictionary(name="autoencoder", says="a whole one, rate to 2 %", lr=0.004, noise=0.0, decay=0.3, final=0.02),
    )


def _soft(step: int) -> float:
    return 4.0 if step < 1000 else 0.4


def _lifted(step: int) -> float:
    return 1.5 if step < 600 else 0.0
