"""Adam, and Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from attrs import field
from attrs.validators import deep_iterable, ge, gt, instance_of, lt
from torch import nn

from spalf.core.slots import optimizer
from spalf.parts.optimizer.rates import FUSED_ON, Bounded, options


@options
class Moments(Bounded):
    """The options of Adam's rule."""

    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=deep_iterable([ge(0.0), lt(1.0)]))
    """Memory of the mean of the gradient and of its square."""
    eps: float = field(default=1e-8, validator=gt(0.0))
    """Added to the root of the mean square."""
    fused: bool = field(default=True, validator=instance_of(bool))
    """Take torch's fused form where it has one for the device: the same numbers up to rounding, in fewer passes."""

    def _is_fused(self, groups: list[dict[str, Any]]) -> bool:
        return self.fused and all(g["params"][0].device.type in FUSED_ON for g in groups)


@optimizer("adam")
class Adam(Moments):
    """Adam (arXiv 1412.6980), with a rate per parameter."""

    rule: ClassVar[str] = "adam"

    @property
    def capturable(self) -> bool:
        return self.fused

    def build(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """One group per parameter, with its name. Fused where torch has that for the parameters' device."""
        groups = self.groups(named)
        fused = self._is_fused(groups)
        on_cuda = all(g["params"][0].is_cuda for g in groups)
        return torch.optim.Adam(
            groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused, capturable=fused and on_cuda
        )


@optimizer("adamw")
class Adamw(Moments):
    """Adam with decoupled weight decay (arXiv 1711.05101), which falls on the encoder's rows alone.

    A decoder row's length is its stratum's affair; bias, thresholds (kept as logarithms) and gain have a zero that
    means nothing, so that a pull towards it would be a pull towards an arbitrary value.
    """

    rule: ClassVar[str] = ""

    weight_decay: float = field(default=0.01, validator=ge(0.0))
    """Share of an encoder row that a step takes off, times the rate."""

    def build(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """One group per parameter, with its name. Fused where torch has that for the parameters' device."""
        groups = self.groups(named)
        for group in groups:
            group["weight_decay"] = self.weight_decay if group["name"] == "W_enc_FD" else 0.0
        fused = self._is_fused(groups)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)
