"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from attrs import field
from attrs.validators import ge, lt
from torch import nn

from spalf.core.slots import optimizer
from spalf.parts.optimizer.rates import Rates


@optimizer("sgd")
class Sgd(Rates):
    """Stochastic gradient descent with heavy-ball momentum, v <- momentum v + g."""

    rule: ClassVar[str] = ""

    momentum: float = field(default=0.9, validator=[ge(0.0), lt(1.0)])
    """Memory of the gradient; 0: none."""

    def build(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """One group per parameter, with its name."""
        return torch.optim.SGD(self.groups(named), lr=self.lr, momentum=self.momentum)
