"""The decoder in closed form: weights and bias together, with weight decay and proximal terms (arXiv 2505.11836).

Minimises over w [F, D] and b [D]

    sum ||y - z w - b||^2 + a ||w||^2 + sum_i r_i ||w_i||^2 + beta ||b||^2 + m ||w - w_t||^2 + n ||b - b_t||^2

from `Sums`. With c the count and C = c + beta + n, eliminating b leaves

    A w = H - s (t + n b_t)' / C + m w_t     A = G - s s' / C + diag(r) + (a + m) I     b = (t - w's + n b_t) / C

A penalty 2 lambda sum_i s_i ||w_i|| (an L1 norm that no scaling of codes against rows can lower) is no square, but lies
below one that touches it at w_t: r_i = lambda s_i / ||w_t,i||. So the solve never raises error plus penalty either.

The error may be measured in any metric ||. S^(1/2)|| of the outputs, if the penalties on w and b are measured in the
same one: S cancels. So one solve serves raw and whitened space.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import field, frozen
from attrs.validators import ge
from torch import Tensor

from spalf import RunError
from spalf_pam.sums import Sums

DENSE_LIMIT = 32_768
"""Features up to which a Cholesky factor is worth its F^3 / 3 operations and its second F x F matrix."""
TOLERANCE = 1e-10
ITERATIONS = 500


@frozen(kw_only=True)
class Penalties:
    """What the squared error is weighed against, all relative, all >= 0.

    `ridge` a and `damping` m in units of tr(G - s s' / c) / live features; `bias_ridge` beta and `bias_damping` n in
    units of the count. Where rows = features a ridge of 1e-10 lets the error on fresh rows peak (18 to 64 times what it
    is at a quarter of the rows, in the tests); one of 1e-2 leaves a hump of 2 under TopK, and 1e-1 none.
    """

    ridge: float = field(default=0.1, validator=ge(0.0))
    damping: float = field(default=0.0, validator=ge(0.0))
    bias_ridge: float = field(default=0.0, validator=ge(0.0))
    bias_damping: float = field(default=0.0, validator=ge(0.0))


@frozen(kw_only=True, eq=False)
class Decoder:
    """A solution, float64: w_FD, b_D, which features took part, and the relative residual of the linear system."""

    w_FD: Tensor
    b_D: Tensor
    live_F: Tensor
    residual: Tensor


@frozen(kw_only=True, eq=False)
class _System:
    """A w = right, with dead features' equations replaced by w = w_t. Never forms A unless asked."""

    sums: Sums
    live_F: Tensor
    shift_F: Tensor
    total: Tensor
    right_FD: Tensor

    def times(self, v_FD: Tensor) -> Tensor:
        """A v [F, D], by the sums alone."""
        on_F1 = self.live_F[:, None].to(v_FD.dtype)
        u_FD = v_FD * on_F1
        out_FD = self.sums.G_FF @ u_FD - torch.outer(self.sums.s_F, self.sums.s_F @ u_FD) / self.total
        return torch.where(self.live_F[:, None], out_FD + self.shift_F[:, None] * u_FD, v_FD)

    def diagonal_F(self) -> Tensor:
        own_F = self.sums.G_FF.diagonal() - self.sums.s_F.square() / self.total + self.shift_F
        return torch.where(self.live_F, own_F, 1.0)

    def dense(self) -> Tensor:
        """A [F, F], a copy."""
        A_FF = torch.addr(self.sums.G_FF, self.sums.s_F, self.sums.s_F / self.total, alpha=-1.0)
        A_FF.masked_fill_(~self.live_F, 0.0).masked_fill_(~self.live_F[:, None], 0.0)
        A_FF.diagonal().copy_(self.diagonal_F())
        return A_FF


def solve(
    sums: Sums,
    w_FD: Tensor,
    b_D: Tensor,
    penalties: Penalties,
    method: str = "auto",
    ridge_F: Tensor | None = None,
) -> Decoder:
    """The minimiser, from the sums and the decoder (w_FD [F, D], b_D [D]) that proximal terms hold on to.

    `ridge_F` [F] are the r_i, in the unit of the sums. A dead feature keeps its row of `w_FD`. `method`: "cholesky",
    "cg" (conjugate gradients from `w_FD`, no second F x F matrix), or "auto": the former up to 32,768 features. Raises
    RunError where nothing was summed, where the system is singular (Cholesky), or where conjugate gradients do not
    converge.
    """
    if float(sums.count) <= 0:
        raise RunError("pam: there are no codes to solve for a decoder from (collect rows before a solve)")
    w_t, b_t = w_FD.double(), b_D.double()
    system = _system(sums, w_t, b_t, penalties, torch.zeros_like(sums.s_F) if ridge_F is None else ridge_F)
    chosen = method if method != "auto" else ("cholesky" if w_FD.shape[0] <= DENSE_LIMIT else "cg")
    solved_FD = _cholesky(system) if chosen == "cholesky" else _cg(system, w_t)
    residual = (system.times(solved_FD) - system.right_FD).norm() / system.right_FD.norm().clamp(min=1e-300)
    n = penalties.bias_damping * sums.count
    b_new = (sums.t_D - solved_FD.T @ sums.s_F + n * b_t) / system.total
    return Decoder(w_FD=solved_FD, b_D=b_new, live_F=system.live_F, residual=residual)


def _system(sums: Sums, w_t: Tensor, b_t: Tensor, penalties: Penalties, ridge_F: Tensor) -> _System:
    live_F, unit = sums.live_F(), sums.scale()
    a, m = penalties.ridge * unit, penalties.damping * unit
    n = penalties.bias_damping * sums.count
    total = sums.count * (1.0 + penalties.bias_ridge) + n
    right_FD = sums.H_FD - torch.outer(sums.s_F, (sums.t_D + n * b_t) / total) + m * w_t
    right_FD = torch.where(live_F[:, None], right_FD, w_t)
    return _System(sums=sums, live_F=live_F, shift_F=ridge_F + a + m, total=total, right_FD=right_FD)


def _cholesky(system: _System) -> Tensor:
    factor_FF, failed = torch.linalg.cholesky_ex(system.dense())
    if int(failed):
        raise RunError(
            "pam: the decoder's linear system is singular: features fire together, or there are fewer rows than "
            "features (raise ridge to 0.01 or more, or collect more rows per solve)"
        )
    return torch.cholesky_solve(system.right_FD, factor_FF)


def _cg(system: _System, start_FD: Tensor) -> Tensor:
    solved_FD, left = conjugate_gradients(system.times, system.diagonal_F(), system.right_FD, start_FD)
    if not left <= TOLERANCE:
        raise RunError(
            f"pam: conjugate gradients stand at a residual of {left:.1e} after {ITERATIONS} steps, above {TOLERANCE:g} "
            "(raise ridge, which bounds the condition of the system)"
        )
    return solved_FD


def majorant(sums: Sums, length_F: Tensor, weight: float) -> Tensor:
    """r_F of the penalty weight * sum_i s_i ||w_i||, s_i >= 0, at rows of length_F: weight s_i / (2 ||w_t,i||).

    Lengths below 1e-6 of their mean count as that: r is finite, and such a row stays where it is, near zero.
    """
    length_F = length_F.double()
    return weight * sums.s_F / (2 * length_F.clamp(min=1e-6 * float(length_F.mean()) + 1e-300))


def conjugate_gradients(
    times: Callable[[Tensor], Tensor],
    diagonal_F: Tensor,
    right_FD: Tensor,
    start_FD: Tensor,
    tolerance: float = TOLERANCE,
    iterations: int = ITERATIONS,
) -> tuple[Tensor, float]:
    """(X, largest relative residual of a column) for A X = right, A symmetric positive definite, from `start_FD`.

    One recursion per column, products shared, preconditioned by the diagonal. Stops when every column's residual is at
    most `tolerance` times its right side, or after `iterations` products.
    """
    x_FD = start_FD.clone()
    r_FD = right_FD - times(x_FD)
    size_D = right_FD.norm(dim=0).clamp(min=torch.finfo(right_FD.dtype).tiny)
    z_FD = r_FD / diagonal_F[:, None]
    p_FD, rz_D = z_FD, (r_FD * z_FD).sum(0)
    left = float((r_FD.norm(dim=0) / size_D).max())
    for _ in range(iterations):
        if left <= tolerance:
            break
        q_FD = times(p_FD)
        # A column that has converged has p = 0: its step is 0 / 0, and must be 0.
        step_D = torch.where(rz_D > 0, rz_D / (p_FD * q_FD).sum(0), 0.0)
        x_FD = x_FD + step_D * p_FD
        r_FD = r_FD - step_D * q_FD
        z_FD = r_FD / diagonal_F[:, None]
        new_D = (r_FD * z_FD).sum(0)
        p_FD = z_FD + torch.where(rz_D > 0, new_D / rz_D, 0.0) * p_FD
        rz_D = new_D
        left = float((r_FD.norm(dim=0) / size_D).max())
    return x_FD, left
