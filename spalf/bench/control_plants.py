"""Constrained problems with known multipliers, for laws that move multipliers. All float64, all planted.

A plant is min f(x, t) subject to g_M(x, t) <= 0, seen through batches. Where x* is planted with multipliers lam*, f
carries the term -lam*' grad g (x - x*), so that lam* is exact whatever g is. C configurations of laws, S seeds, N
variables, M constraints, B rows of a batch; draws are per seed and shared by all configurations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar

import torch
from attrs import field, frozen
from torch import Tensor

F64 = torch.float64


@frozen(kw_only=True, eq=False)
class Plant(ABC):
    """What every problem has: its name, how its primal is driven, and how noisy and how late its violations are.

    The rate falls linearly to `final` over the last share `decay` of the steps, as `schedule = "linear"` does. `judged`
    is the step from which a law is judged: before it the target is out of reach, or nobody asks for it.
    """

    known: ClassVar[bool] = True
    """Whether `target_M` is exact."""

    name: str
    says: str
    steps: int = 2000
    lr: float = 0.01
    adam: bool = True
    decay: float = 0.0
    final: float = 1.0
    noise: float = 0.02
    delay: int = 0
    judged: int = 0

    @abstractmethod
    def start_N(self) -> Tensor:
        """Where the primal begins."""

    def draw(self, seeds: int, random: torch.Generator) -> Any:
        """One batch for every seed."""
        return None

    @abstractmethod
    def measure(self, x_CSN: Tensor, batch: Any, step: int) -> tuple[Tensor, Tensor]:
        """(f [C, S], g [C, S, M]) of one batch, with graph."""

    @abstractmethod
    def exact(self, x_CSN: Tensor, step: int) -> Tensor:
        """g [C, S, M] without noise."""

    @abstractmethod
    def target_M(self, step: int) -> Tensor:
        """lam* at this time."""

    def on(self, step: int) -> bool:
        """Whether the constraints are switched on."""
        return True

    def project_(self, x_CSN: Tensor, step: int) -> None:
        """Keep the primal where it can be."""
        return None


def _still(step: int) -> float:
    return 1.0


@frozen(kw_only=True, eq=False)
class Linear(Plant):
    """Quadratic objective, linear constraints g = J (x - x*) - slack + lift: x* = 0.

    `course` scales lam* over time, `stiffness` the objective's curvature h, `lift` is added to every violation, and the
    primal stays within `reach` of x*.
    """

    h_N: Tensor
    J_MN: Tensor
    lam_M: Tensor
    slack_M: Tensor
    start: float = 1.0
    shake: float = 0.0
    enters: int = 0
    reach: float = math.inf
    course: Any = field(default=_still)
    stiffness: Any = field(default=_still)
    lift: Any = field(default=lambda step: 0.0)

    def start_N(self) -> Tensor:
        return torch.full_like(self.h_N, self.start)

    def draw(self, seeds: int, random: torch.Generator) -> Any:
        return torch.randn(seeds, len(self.h_N), generator=random, dtype=F64) * self.shake if self.shake else None

    def measure(self, x_CSN: Tensor, batch: Any, step: int) -> tuple[Tensor, Tensor]:
        g_CSM = x_CSN @ self.J_MN.T
        quadratic_CS = (x_CSN.square() * self.h_N).sum(-1) * (0.5 * self.stiffness(step))
        f_CS = quadratic_CS - (g_CSM * self.target_M(step)).sum(-1)
        if batch is not None:
            f_CS = f_CS + (x_CSN * batch).sum(-1)
        return f_CS, g_CSM - self.slack_M + self.lift(step)

    def exact(self, x_CSN: Tensor, step: int) -> Tensor:
        g_CSM: Tensor = x_CSN @ self.J_MN.T - self.slack_M + self.lift(step)
        return g_CSM

    def target_M(self, step: int) -> Tensor:
        lam_M: Tensor = self.lam_M * self.course(step)
        return lam_M

    def on(self, step: int) -> bool:
        return step >= self.enters

    def project_(self, x_CSN: Tensor, step: int) -> None:
        if math.isfinite(self.reach):
            x_CSN.clamp_(-self.reach, self.reach)


@frozen(kw_only=True, eq=False)
class Ball(Plant):
    """min -lam* grad g(x*)' x subject to g = |x|^2 / n - 1 <= 0, under noisy gradients: the steps' noise adds to g.

    With the rate falls that noise, and with it the violation: what held the boundary at full rate ends inside it.
    """

    n: int = 32
    lam: float = 1.5
    shake: float = 1.0

    def start_N(self) -> Tensor:
        return torch.full((self.n,), 1.5, dtype=F64)

    def draw(self, seeds: int, random: torch.Generator) -> Any:
        return torch.randn(seeds, self.n, generator=random, dtype=F64) * (self.shake / self.n)

    def measure(self, x_CSN: Tensor, batch: Any, step: int) -> tuple[Tensor, Tensor]:
        # x* = (1, ..., 1): grad g there is 2 / n in every direction. f is flat at a square, so that its minimum is one.
        f_CS = -(2.0 * self.lam / self.n) * x_CSN.sum(-1) + (x_CSN * batch).sum(-1)
        return f_CS, self.exact(x_CSN, step)

    def exact(self, x_CSN: Tensor, step: int) -> Tensor:
        return x_CSN.square().mean(-1, keepdim=True) - 1.0

    def target_M(self, step: int) -> Tensor:
        return torch.tensor([self.lam], dtype=F64)


@frozen(kw_only=True, eq=False)
class Rate(Plant):
    """A rate through a sigmoid, over points of which each batch shows a few: g = mean sigmoid(4 a'x) / rate - 1."""

    n: int = 6
    points: int = 512
    rows: int = 64
    lam: float = 0.8

    @cached_property
    def _planted(self) -> tuple[Tensor, float, Tensor]:
        """Points, the rate at x* = (-.5, ..., -.5), and the gradient of g there."""
        random = torch.Generator().manual_seed(7)
        points_PN = torch.randn(self.points, self.n, generator=random, dtype=F64) + 0.3
        x_N = torch.full((self.n,), -0.5, dtype=F64)
        s_P = torch.sigmoid(4.0 * points_PN @ x_N)
        rate = float(s_P.mean())
        grad_N = ((4.0 * s_P * (1 - s_P))[:, None] * points_PN).mean(0) / rate
        return points_PN, rate, grad_N

    def start_N(self) -> Tensor:
        return torch.full((self.n,), 0.5, dtype=F64)

    def draw(self, seeds: int, random: torch.Generator) -> Any:
        return torch.randint(self.points, (seeds, self.rows), generator=random)

    def measure(self, x_CSN: Tensor, batch: Any, step: int) -> tuple[Tensor, Tensor]:
        points_PN, rate, grad_N = self._planted
        away_CSN = x_CSN + 0.5
        f_CS = 0.5 * away_CSN.square().sum(-1) - self.lam * (away_CSN @ grad_N)
        shown_SBN = points_PN[batch]
        s_CSB = torch.sigmoid(4.0 * torch.einsum("sbn,csn->csb", shown_SBN, x_CSN))
        return f_CS, s_CSB.mean(-1, keepdim=True) / rate - 1.0

    def exact(self, x_CSN: Tensor, step: int) -> Tensor:
        points_PN, rate, _ = self._planted
        return torch.sigmoid(4.0 * x_CSN @ points_PN.T).mean(-1, keepdim=True) / rate - 1.0

    def target_M(self, step: int) -> Tensor:
        return torch.tensor([self.lam], dtype=F64)
