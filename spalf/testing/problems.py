"""A bank of convex problems with known multipliers, and the loop that runs any dual on all of them at once.

A problem is min x'Hx/2 + c'x subject to J x <= b, with a diagonal H. Its multipliers come from the enumeration of
active sets, not from an optimiser. P problems, N variables, M constraints, C = P * M constraints of a batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from spalf.core.protocols import Dual, Filter


@frozen(kw_only=True, eq=False)
class Problem:
    """min x'Hx/2 + c'x subject to J x <= b, all float64; H = diag(h_N) > 0."""

    name: str
    h_N: Tensor
    c_N: Tensor
    J_MN: Tensor
    b_M: Tensor

    def multipliers(self) -> Tensor:
        """lam* [M]: over all active sets, the one whose point is feasible and whose multipliers are not negative."""
        m = self.b_M.shape[0]
        for size in range(m + 1):
            for active in itertools.combinations(range(m), size):
                lam_M = self._try(list(active))
                if lam_M is not None:
                    return lam_M
        raise ValueError(f"problem {self.name} has no KKT point: its constraints contradict each other")

    def _try(self, active: list[int]) -> Tensor | None:
        """The multipliers of one active set, or None where it is not the optimal one."""
        lam_M = torch.zeros_like(self.b_M)
        if active:
            A = self.J_MN[active]
            # H x + c + A' lam = 0 and A x = b: A H^-1 A' lam = -b - A H^-1 c
            schur = (A / self.h_N) @ A.T
            if torch.linalg.matrix_rank(schur) < len(active):
                return None
            lam_M[active] = torch.linalg.solve(schur, -self.b_M[active] - (A / self.h_N) @ self.c_N)
        x_N = self.point(lam_M)
        is_optimal = bool((lam_M >= -1e-9).all()) and bool((self.J_MN @ x_N <= self.b_M + 1e-9).all())
        return lam_M if is_optimal else None

    def point(self, lam_M: Tensor) -> Tensor:
        """The minimiser of the Lagrangian at these multipliers, [N]."""
        x_N: Tensor = -(self.c_N + self.J_MN.T @ lam_M) / self.h_N
        return x_N


def _planted(
    name: str, h: Sequence[float], x: Sequence[float], J: Tensor, lam: Sequence[float], slack: Sequence[float]
) -> Problem:
    """The problem whose minimum is x with multipliers lam; `slack` is b - J x."""
    h_N, x_N = torch.tensor(h, dtype=torch.float64), torch.tensor(x, dtype=torch.float64)
    lam_M, slack_M = torch.tensor(lam, dtype=torch.float64), torch.tensor(slack, dtype=torch.float64)
    return Problem(name=name, h_N=h_N, c_N=-(h_N * x_N + J.T @ lam_M), J_MN=J, b_M=J @ x_N + slack_M)


def _rows(cosines: Sequence[Sequence[float]], n: int) -> Tensor:
    """Unit rows [M, n] with these pairwise cosines, spread over all axes by a cosine transform."""
    factor = torch.linalg.cholesky(torch.tensor(cosines, dtype=torch.float64))
    k, i = torch.arange(len(cosines)).double()[:, None], torch.arange(n).double()[None]
    basis = torch.cos(math.pi * k * (2 * i + 1) / (2 * n)) * math.sqrt(2.0 / n)
    basis[0] /= math.sqrt(2.0)
    rows: Tensor = factor @ basis
    return rows


def bank() -> tuple[Problem, ...]:
    """Small problems of different kinds; every one has a unique multiplier vector."""
    eye = torch.eye(3, dtype=torch.float64)
    lengths = torch.tensor([1.5, 0.5], dtype=torch.float64)
    near = [[1.0, 0.95], [0.95, 1.0]]
    three = [[1.0, 0.59, 0.72], [0.59, 1.0, 0.86], [0.72, 0.86, 1.0]]
    spread = [1.0, 2.0, 3.0, 5.0, 8.0, 12.0]
    return (
        # min (x - 2)^2 subject to x <= 1: lam* = 2
        _planted("scalar", [2.0], [1.0], eye[:1, :1], [2.0], [0.0]),
        # three correlated constraints, the third slack
        _planted(
            "coupled", spread, [0.5, -0.3, 0.2, 0.4, -0.1, 0.3], _rows(three, 6), [1.2, 0.8, 0.0], [0.0, 0.0, 0.5]
        ),
        # nothing binds
        _planted("slack", [1.0, 4.0], [0.2, -0.4], eye[:2, :2], [0.0, 0.0], [0.3, 1.0]),
        # separate constraints whose multipliers span a factor of 25
        _planted("box", [1.0, 2.0, 4.0], [1.0, -1.0, 0.5], eye, [0.2, 5.0, 1.0], [0.0, 0.0, 0.0]),
        # gradients of different length: one constraint weighs nine times the other
        _planted("scaled", [2.0, 3.0, 6.0], [0.3, 0.1, -0.2], lengths[:, None] * eye[:2], [1.0, 2.0], [0.0, 0.0]),
        # nearly parallel gradients: which of the two multipliers carries the load is hard to tell
        _planted("parallel", [2.0, 3.0, 4.0, 6.0], [0.1, 0.2, -0.3, 0.4], _rows(near, 4), [1.0, 0.0], [0.0, 0.4]),
    )


@frozen(kw_only=True, eq=False)
class Bank:
    """Problems padded to one shape: a missing constraint is never violated, a missing variable stays at 0."""

    problems: tuple[Problem, ...]
    h_PN: Tensor
    c_PN: Tensor
    J_PMN: Tensor
    b_PM: Tensor
    lam_PM: Tensor

    @classmethod
    def of(cls, problems: Sequence[Problem], copies: int = 1) -> Bank:
        """`copies` of each problem, copy by copy."""
        many = tuple(problems) * copies
        n, m, p = max(q.h_N.shape[0] for q in many), max(q.b_M.shape[0] for q in many), len(many)
        h, c = torch.ones(p, n, dtype=torch.float64), torch.zeros(p, n, dtype=torch.float64)
        J = torch.zeros(p, m, n, dtype=torch.float64)
        b, lam = torch.ones(p, m, dtype=torch.float64), torch.zeros(p, m, dtype=torch.float64)
        for i, q in enumerate(many):
            nn, mm = q.h_N.shape[0], q.b_M.shape[0]
            h[i, :nn], c[i, :nn], J[i, :mm, :nn], b[i, :mm] = q.h_N, q.c_N, q.J_MN, q.b_M
            lam[i, :mm] = q.multipliers()
        return cls(problems=many, h_PN=h, c_PN=c, J_PMN=J, b_PM=b, lam_PM=lam)


@frozen(kw_only=True, eq=False)
class Trace:
    """Multipliers at each tick, [ticks, P, M], and the points where the primal ended, [P, N]."""

    lam_TPM: Tensor
    every: int
    x_PN: Tensor

    def error_T(self, lam_PM: Tensor, scale: float = 1.0) -> Tensor:
        """Largest |lam - lam*| over everything, per tick."""
        return ((self.lam_TPM - lam_PM).abs().flatten(1).max(1).values) / scale


def _zero_noise(step: int) -> float:
    return 0.0


@frozen(kw_only=True, eq=False)
class Loop:
    """Gradient descent on the augmented Lagrangian of every problem, with a dual on top of a filter.

    `noise` gives what is added to the measured violations [P, M] at a step, `shift` what is added to b; `delay_P` is
    how many steps old the measurements are.
    """

    bank: Bank
    filter: Any
    lr: float = 0.01
    rho: float = 1.0
    delay_P: Tensor | None = None
    noise: Callable[[int], Tensor | float] = field(default=_zero_noise)
    shift: Callable[[int], Tensor | float] = field(default=_zero_noise)

    def run(self, dual: Dual[Any], steps: int) -> Trace:
        """Pure: same arguments, same trace."""
        bank = self.bank
        filter: Filter[Any] = self.filter
        shape = bank.b_PM.shape
        control_state, seen = dual.init(shape.numel()), filter.init(shape.numel())
        on_C = torch.ones(shape.numel(), dtype=torch.bool)
        x_PN = torch.zeros_like(bank.h_PN)
        history: list[Tensor] = []
        oldest = 0 if self.delay_P is None else int(self.delay_P.max())
        ticks: list[Tensor] = []
        for step in range(steps):
            g_PM = (bank.J_PMN @ x_PN[..., None])[..., 0] - bank.b_PM - self.shift(step)
            g_C = (self._measured(g_PM, history, oldest) + self.noise(step)).flatten().float()
            if step == 0:
                seen = filter.enter(seen, g_C, on_C)
            seen = filter.step(seen, g_C, on_C)
            if (step + 1) % filter.every == 0:
                control_state = dual.step(control_state, filter.signal(seen, g_C, on_C))
                seen = filter.tick(seen)
                ticks.append(control_state.lam_M)
            # gradient of x'Hx/2 + c'x + sum rho Psi: H x + c + J' [lam + 2 rho g]+
            push_PM = (control_state.lam_M.double().view(shape) + 2 * self.rho * g_PM).clamp(min=0)
            x_PN = x_PN - self.lr * (bank.h_PN * x_PN + bank.c_PN + (push_PM[:, None] @ bank.J_PMN)[:, 0])
        return Trace(lam_TPM=torch.stack(ticks).double().view(-1, *shape), every=filter.every, x_PN=x_PN)

    def _measured(self, g_PM: Tensor, history: list[Tensor], oldest: int) -> Tensor:
        """Violations as old as each problem's delay; the first ones until then."""
        if self.delay_P is None:
            return g_PM
        history.append(g_PM)
        if len(history) > oldest + 1:
            history.pop(0)
        # the entry that is `delay` steps old, or the oldest one
        age_P = self.delay_P.clamp(max=len(history) - 1).tolist()
        return torch.stack([history[len(history) - 1 - int(age)][p] for p, age in enumerate(age_P)])
