"""Activation `soft_threshold`: signed codes, exact zeros between the signs.

Shapes: B rows, F features, C columns of a calibration sample.
"""

from __future__ import annotations

from typing import Any

import torch
from attrs import field
from attrs.validators import gt
from torch import Tensor, nn

from spalf import Activator, activation

LAYER_NORM_EPS = 1e-5


class _Shrink(torch.autograd.Function):
    """(z, gate) = (sign(p) [|p| - theta]+, 1[|p| > theta]).

    z has its own gradient almost everywhere; the gate, a step in |p|, has the rectangle 1[| |p| - theta | < eps / 2] /
    eps in place of one, and only towards theta.
    """

    @staticmethod
    def forward(ctx: Any, pre_BF: Tensor, log_threshold_F: Tensor, bandwidth_F: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(pre_BF, log_threshold_F, bandwidth_F)
        beyond_BF = pre_BF.abs() - log_threshold_F.exp()
        gate_BF = (beyond_BF > 0).to(pre_BF.dtype)
        return pre_BF.sign() * beyond_BF * gate_BF, gate_BF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_z, grad_gate = grads
        pre_BF, log_threshold_F, eps_F = ctx.saved_tensors
        theta_F = log_threshold_F.exp()
        beyond_BF = pre_BF.abs() - theta_F
        to_pre, to_theta_F = None, torch.zeros_like(theta_F)
        if grad_z is not None:
            to_pre = grad_z * (beyond_BF > 0)
            to_theta_F = to_theta_F - (to_pre * pre_BF.sign()).sum(0)  # dz / dtheta = -sign(p) inside
        if grad_gate is not None:
            inside_BF = beyond_BF.abs() < eps_F / 2
            to_theta_F = to_theta_F - (grad_gate * inside_BF).sum(0) / eps_F
        return to_pre, theta_F * to_theta_F, None


class SoftThresholdActivator(nn.Module, Activator):
    """One threshold per feature, learned as its logarithm; dense codes only."""

    signed = True
    bandwidth_F: Tensor

    def __init__(self, width: int, options: SoftThreshold) -> None:
        super().__init__()
        self._options, self._width = options, width
        if options.learned:
            self.log_threshold_F = nn.Parameter(torch.zeros(width))
            self.register_buffer("bandwidth_F", torch.full((width,), options.bandwidth))

    def forward(self, pre_BK: Tensor, index_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(z_BF, gate_BF), z of either sign; `index_BK` is always None, because `reach_F` is."""
        assert index_BK is None, "signed codes are dense"
        pre_BF = self._normalised(pre_BK)
        if not self._options.learned:
            return pre_BF, (pre_BF != 0).to(pre_BF.dtype)
        out: tuple[Tensor, Tensor] = _Shrink.apply(  # type: ignore[no-untyped-call]
            pre_BF, self.log_threshold_F, self.bandwidth_F
        )
        return out

    def _normalised(self, pre_BF: Tensor) -> Tensor:
        if not self._options.layer_norm:
            return pre_BF
        return nn.functional.layer_norm(pre_BF, pre_BF.shape[-1:], eps=LAYER_NORM_EPS)

    @torch.no_grad()
    def calibrate_(self, pre_BC: Tensor, density: float, rows: slice) -> None:
        """Thresholds between two order statistics of each column's |p|, so that a share `density` exceeds it.

        With `layer_norm` the norm is taken over the columns at hand: all, or as many as are calibrated at once.
        """
        if not self._options.learned:
            return
        size_CB = self._normalised(pre_BC).abs().T.contiguous()
        n = size_CB.shape[1]
        k = min(max(1, round(density * n)), n - 1)
        top_CK = size_CB.topk(k + 1, dim=1).values
        theta_C = ((top_CK[:, k - 1] + top_CK[:, k]) / 2).clamp(min=self._options.floor)
        self.log_threshold_F[rows] = theta_C.log().to(self.log_threshold_F)
        # The window in units of |p|'s own spread, as far as the sample has any.
        spread_C = size_CB.std(dim=1).clamp(min=self._options.floor)
        self.bandwidth_F[rows] = (self._options.bandwidth * spread_C).to(self.bandwidth_F)

    def reach_F(self) -> None:
        """None: a list of entries above a pre-activation has no place for negative ones."""

    def threshold_F(self) -> Tensor:
        """theta [F], on |p|; 0 where nothing is learned."""
        if self._options.learned:
            return self.log_threshold_F.exp()
        return torch.zeros(self._width)

    def affine_F(self) -> tuple[Tensor, Tensor]:
        """(1, -theta): |z| = |p| - theta."""
        theta_F = self.threshold_F()
        return torch.ones_like(theta_F), -theta_F


@activation("soft_threshold")
class SoftThreshold:
    """S(p) = sign(p) max(|p| - theta, 0): signed codes for differences, which go both ways.

    A feature that a shift switches on is the one that the mirrored shift switches off: one row and two signs, where a
    one-sided activation needs two rows. theta is learned per feature, through z by its own gradient and through the
    gate by a window of `bandwidth` standard deviations of |p| around it. `start`: active features at the start of
    training, as a multiple of the target (calibration reads it; at most half of all). `floor`: least theta and window.

    `learned` = false leaves out the threshold: z = p, an affine code that no count can make sparse.
    `layer_norm` normalises p over the features first, as arXiv 2502.12179's published code does (there without
    threshold). It is here for comparison: it takes ||delta|| out of the code, so that delta and 2 delta decode alike
    where b_enc is 0; mean |h| is no longer a matter of sparsity alone; and over a single feature it is constant, so
    that a one-concept model does not depend on its input.
    """

    learned: bool = True
    layer_norm: bool = False
    bandwidth: float = field(default=0.2, validator=gt(0.0))
    start: float = field(default=4.0, validator=gt(0.0))
    floor: float = field(default=1e-3, validator=gt(0.0))

    def build(self, width: int) -> Activator:
        return SoftThresholdActivator(width, self)
