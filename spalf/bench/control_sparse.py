"""JumpReLU codes of planted data, for laws that move multipliers; shapes as in `control_plants`, F features.

Feature j fires with probability p_j and an exponential magnitude of mean s_j; its code is kept above theta_j. The
optimal thresholds are all equal, which gives counts, errors and multipliers in closed form.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, ClassVar

import torch
from attrs import frozen
from torch import Tensor

from spalf.bench.control_plants import F64, Plant


def _gate(a: Tensor, theta: Tensor, width: float) -> Tensor:
    """1 where a > theta; its gradient is that of a ramp of this width."""
    ramp = ((a - theta) / width + 0.5).clamp(0.0, 1.0)
    return (a > theta).to(a) + (ramp - ramp.detach())


@frozen(kw_only=True, eq=False)
class Thresholds(Plant):
    """x = log theta. With `rate`, fewest errors at a given count; without, the fewest codes at a given error."""

    n: int = 16
    rows: int = 128
    theta: float = 1.0
    rate: bool = False
    begin: float = 0.3
    """theta at the start, as a share of the optimal one."""

    @cached_property
    def _planted(self) -> tuple[Tensor, Tensor]:
        """(p, s) of every feature."""
        j = torch.arange(self.n, dtype=F64)
        return 0.4 / (1.0 + 0.25 * j), 1.5 - j / self.n

    def _count(self, theta: Tensor) -> Tensor:
        p_N, s_N = self._planted
        return (p_N * torch.exp(-theta / s_N)).sum(-1)

    def _error(self, theta: Tensor) -> Tensor:
        """sum_j p_j E[a^2 1(a < theta_j)]."""
        p_N, s_N = self._planted
        left_N = torch.exp(-theta / s_N) * (theta.square() + 2 * s_N * theta + 2 * s_N.square())
        return (p_N * (2 * s_N.square() - left_N)).sum(-1)

    @cached_property
    def _budgets(self) -> tuple[float, float]:
        """Count and error at the optimum."""
        best_N = torch.full((self.n,), self.theta, dtype=F64)
        return float(self._count(best_N)), float(self._error(best_N))

    def start_N(self) -> Tensor:
        return torch.full((self.n,), math.log(self.begin * self.theta), dtype=F64)

    def draw(self, seeds: int, random: torch.Generator) -> Any:
        p_N, s_N = self._planted
        shape = (seeds, self.rows, self.n)
        fires = torch.rand(shape, generator=random, dtype=F64) < p_N
        return fires * s_N * -torch.log1p(-torch.rand(shape, generator=random, dtype=F64))

    def measure(self, x_CSN: Tensor, batch: Any, step: int) -> tuple[Tensor, Tensor]:
        count, error = self._budgets
        # Stacked by seed: [C, S, 1, N] against [S, B, N].
        gate_CSBN = _gate(batch, x_CSN.exp()[:, :, None], 0.4)
        count_CS = gate_CSBN.sum(-1).mean(-1) / count
        # a^2 (1 - gate), not (a - a gate)^2: equal, but a ramp's gradient is unbiased for the former only.
        error_CS = (batch.square() * (1 - gate_CSBN)).sum(-1).mean(-1) / error
        if self.rate:
            return error_CS, count_CS[..., None] - 1.0
        return count_CS, error_CS[..., None] - 1.0

    def exact(self, x_CSN: Tensor, step: int) -> Tensor:
        count, error = self._budgets
        theta = x_CSN.exp()
        value_CS = self._count(theta) / count if self.rate else self._error(theta) / error
        return value_CS[..., None] - 1.0

    def target_M(self, step: int) -> Tensor:
        # d error = theta^2 p(theta) dtheta, d count = -p(theta) dtheta in every feature
        count, error = self._budgets
        lam = error / (count * self.theta**2)
        return torch.tensor([1.0 / lam if self.rate else lam], dtype=F64)


@frozen(kw_only=True, eq=False)
class Dictionary(Plant):
    """A whole sparse autoencoder on planted directions, in float32: fewest codes at a given error.

    Its multiplier is not known; it is judged by its violations, and by how much its multiplier moves.
    """

    known: ClassVar[bool] = False

    d: int = 8
    planted: int = 24
    n: int = 32
    rows: int = 64
    target_count: float = 2.0
    r2: float = 0.9

    @cached_property
    def _directions(self) -> Tensor:
        random = torch.Generator().manual_seed(11)
        return torch.nn.functional.normalize(torch.randn(self.planted, self.d, generator=random), dim=-1)

    def start_N(self) -> Tensor:
        random = torch.Generator().manual_seed(5)
        rows_FD = torch.nn.functional.normalize(torch.randn(self.n, self.d, generator=random), dim=-1)
        return torch.cat([rows_FD.flatten(), rows_FD.flatten(), torch.full((self.n,), math.log(0.3))])

    def draw(self, seeds: int, random: torch.Generator) -> Any:
        return self._sample((seeds, self.rows), random)

    def _sample(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        fires = torch.rand(*shape, self.planted, generator=random) < 1.5 / self.planted
        size = 1.0 + 0.5 * torch.rand(*shape, self.planted, generator=random)
        return (fires * size) @ self._directions

    def _pass(self, x_CSN: Tensor, y_SBD: Tensor) -> tuple[Tensor, Tensor]:
        """(count, squared error) [C, S], means over rows."""
        size = self.n * self.d
        enc, dec = (x_CSN[..., a : a + size].reshape(*x_CSN.shape[:-1], self.n, self.d) for a in (0, size))
        a_CSBF = y_SBD @ enc.transpose(-1, -2)
        gate = _gate(a_CSBF, x_CSN[..., None, 2 * size :].exp(), 0.2)
        y_hat = (a_CSBF * gate) @ torch.nn.functional.normalize(dec, dim=-1)
        return gate.sum(-1).mean(-1), (y_SBD - y_hat).square().sum(-1).mean(-1)

    @cached_property
    def _judged_SBD(self) -> Tensor:
        return self._sample((1, 8192), torch.Generator().manual_seed(13))

    @cached_property
    def _budget(self) -> float:
        y_BD = self._sample((4096,), torch.Generator().manual_seed(3))
        return (1.0 - self.r2) * float(y_BD.square().sum(-1).mean())

    def measure(self, x_CSN: Tensor, batch: Any, step: int) -> tuple[Tensor, Tensor]:
        count_CS, error_CS = self._pass(x_CSN, batch)
        return count_CS / self.target_count, error_CS[..., None] / self._budget - 1.0

    def exact(self, x_CSN: Tensor, step: int) -> Tensor:
        rows = 8192 if step == self.steps - 1 else 256
        return self._pass(x_CSN, self._judged_SBD[:, :rows])[1][..., None] / self._budget - 1.0

    def target_M(self, step: int) -> Tensor:
        return torch.full((1,), math.nan, dtype=F64)
