"""Whitener `shift_scale`: one number, so that a shift keeps its length and its direction.

Shapes: D d_model.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from spalf import Facts, Metric, Raw, RunError, White, whitener

LAYER_NORM_EPS = 1e-5


class ShiftMetric(nn.Module):
    """white(x) = x / scale: no mean is taken off, so points and directions are mapped alike."""

    scale: Tensor
    total: Tensor
    mean_D: Tensor

    def __init__(self, d_model: int, layer_norm: bool) -> None:
        super().__init__()
        self.d_model = d_model
        self._layer_norm = layer_norm
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("total", torch.tensor(float(d_model)))
        self.register_buffer("mean_D", torch.zeros(d_model))

    def white(self, x: Raw) -> White:
        """x / scale [..., D]; with `layer_norm` each row's own mean and deviation are taken off instead."""
        if self._layer_norm:
            return White(nn.functional.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS))
        return White(x / self.scale.to(x.dtype))

    def raw(self, x: White) -> Raw:
        return Raw(x * self.scale.to(x.dtype))

    def white_direction(self, v: Raw) -> White:
        return White(v / self.scale.to(v.dtype))

    def raw_direction(self, v: White) -> Raw:
        return Raw(v * self.scale.to(v.dtype))

    def rough_direction(self, v: White) -> Raw:
        return self.raw_direction(v)

    def raw_square(self, v: White) -> Tensor:
        return self.scale.square() * v.square().sum()

    def variance(self, space: str) -> Tensor:
        """tr S about the mean of the shifts: in model space, or divided by scale^2 in the scaled one."""
        if space not in ("raw", "white"):
            raise ValueError(f'variance: there is no space "{space}" (use "raw" or "white")')
        return self.total if space == "raw" else self.total / self.scale.square()

    def report(self) -> dict[str, float]:
        """The scale, and the share of E ||delta||^2 that is a shift common to all pairs."""
        common = float(self.mean_D.square().sum())
        return {"scale": float(self.scale), "common_shift": common / (common + float(self.total))}


@whitener("shift_scale")
class ShiftScale:
    """W = I / scale with scale^2 = E ||delta||^2 / d: shifts of mean square 1 per coordinate, and nothing else changed.

    Nothing is centred: the mean of the differences is a shift that all pairs share, which is a concept and not an
    offset. Nothing is whitened: directions of little variance are not made large. One number keeps ||delta||.

    `layer_norm` is the published form (arXiv 2502.12179): each row is divided by its own deviation. It loses ||delta||,
    so that delta and 2 delta are one input; a decoder then gives back shifts of one length, the typical one, and the
    rows of one concept at various strengths become one point.
    """

    centred: ClassVar[bool] = False
    layer_norm: bool = False

    def build(self, facts: Facts) -> Metric:
        return ShiftMetric(facts.d_model, self.layer_norm)

    def fit_(self, metric: Metric, mean_D: Tensor, cov_DD: Tensor) -> None:
        """Raises RunError where all differences are zero or one is not finite."""
        assert isinstance(metric, ShiftMetric)
        total = cov_DD.diagonal().sum()
        square = (total + mean_D.square().sum()) / metric.d_model
        if not bool(torch.isfinite(cov_DD).all() and torch.isfinite(mean_D).all()):
            raise RunError("the differences are not finite (look for NaN or overflow at the hook)")
        if float(square) <= 0.0:
            raise RunError("all differences are zero, so there is no shift to learn (check the pairs and the hook)")
        metric.scale.copy_(square.sqrt())
        metric.total.copy_(total)
        metric.mean_D.copy_(mean_D)
