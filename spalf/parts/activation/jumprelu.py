"""Learned thresholds, one per feature, and their pseudo-gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from attrs import evolve, field
from attrs.validators import ge, gt
from torch import Tensor, nn

from spalf.core.protocols import Activator
from spalf.core.recipe import Derived, Plan
from spalf.core.slots import activation
from spalf.core.values import per_feature
from spalf.parts.activation.entries import listed, order_statistics, upper_quantiles, wide

# Interquartile range of a unit Gaussian: the spread of a whitened pre-activation before any calibration.
_GAUSSIAN_IQR = 1.349


def _holds(test: Callable[..., Any], a: Tensor, b: Tensor) -> Tensor:
    """1.0 where the test holds, else 0.0, in the type of `a`: a fifth of the time of a boolean that is converted."""
    out: Tensor = test(a, b, out=torch.empty_like(a))
    return out


class _Jump(torch.autograd.Function):
    """(z, gate) = (p h, h), h = 1[p > theta], with kernel estimates as the gradients at log theta (2407.14435).

    `ramp` selects the gate's kernel: False the rectangle 1[|p - theta| < eps/2] / eps, on both sides of the threshold;
    True the slope of H's Moreau envelope, (p - theta) / gamma on (theta, theta + eps], gamma = eps^2 / 2. `push` lets
    that slope reach p too. `post` tests the gate's rectangle on z instead of p.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pre_BK: Tensor,
        log_threshold_F: Tensor,
        bandwidth_F: Tensor,
        index_BK: Tensor | None,
        ramp: bool,
        push: bool,
        post: bool,
    ) -> tuple[Tensor, Tensor]:
        theta_F = log_threshold_F.exp()
        # Padding is never above, and finite, so that 0 times it is 0.
        theta = listed(theta_F, index_BK, torch.finfo(theta_F.dtype).max)
        gate_BK = _holds(torch.gt, pre_BK, theta)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(pre_BK, theta_F, theta, bandwidth_F, gate_BK, index_BK)
        ctx.ramp, ctx.push, ctx.post = ramp, push, post
        return pre_BK * gate_BK, gate_BK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_z, grad_gate = grads
        pre_BK, theta_F, theta, eps_F, gate_BK, index_BK = ctx.saved_tensors
        half = listed(eps_F / 2, index_BK, 1.0)
        # to log theta: -(theta^2 gz + theta gh) K((p - theta) / eps) / eps, summed over rows
        to_pre, to_log_F, force = None, torch.zeros_like(theta_F), None
        if grad_z is not None:
            to_pre, force = grad_z * gate_BK, grad_z * theta
        if grad_gate is not None and ctx.ramp:
            # slope of the envelope: (p - theta) / gamma
            slope = torch.where((gate_BK > 0) & (pre_BK <= theta + 2 * half), (pre_BK - theta) / (2 * half**2), 0.0)
            to_log_F = to_log_F - theta_F * per_feature(grad_gate * slope, index_BK, len(theta_F))
            if ctx.push:
                to_pre = grad_gate * slope if to_pre is None else to_pre + grad_gate * slope
        elif grad_gate is not None:
            if ctx.post:
                z_BK = pre_BK * gate_BK
                grad_gate = grad_gate * ((z_BK > theta - half) & (z_BK < theta + half))
            force = grad_gate if force is None else force + grad_gate
        if force is not None:
            window_BK = _holds(torch.gt, pre_BK, theta - half) * _holds(torch.lt, pre_BK, theta + half)
            inside_F = per_feature(force * window_BK, index_BK, len(theta_F))
            to_log_F = to_log_F - theta_F / eps_F * inside_F
        return to_pre, to_log_F, None, None, None, None, None


class JumpReLUActivator(nn.Module, Activator):
    """z = p 1[p > theta], one threshold and one window width per feature; theta is learned as its logarithm."""

    bandwidth_F: Tensor

    def __init__(self, width: int, options: JumpReLU | JumpReLUMoreau) -> None:
        super().__init__()
        self._options = options
        self._ramp = isinstance(options, JumpReLUMoreau)
        self._push = isinstance(options, JumpReLUMoreau) and options.push
        self._post = isinstance(options, JumpReLU) and options.post
        self.pre_bias = options.pre_bias
        self.log_threshold_F = nn.Parameter(torch.zeros(width))
        self.step_F = nn.Parameter(torch.zeros(width)) if options.refine else None
        self.register_buffer("bandwidth_F", torch.full((width,), options.bandwidth * _GAUSSIAN_IQR))

    def forward(self, pre_BK: Tensor, index_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(z_BK, gate_BK), gate in {0, 1}, in at least float32; entries whose index is the width give 0."""
        out: tuple[Tensor, Tensor] = _Jump.apply(  # type: ignore[no-untyped-call]
            wide(pre_BK), self.log_threshold_F, self.bandwidth_F, index_BK, self._ramp, self._push, self._post
        )
        return out

    def calibrate_(self, pre_BC: Tensor, density: float, rows: slice) -> None:
        """Thresholds between two order statistics of each column, so that a share `density` of its entries exceeds it.

        At least one and at most all but one entry of a column is active; a threshold that would fall below `floor` is
        raised to it. Calibrate on 20 / density rows or more: the tail of fewer is noise.
        """
        with torch.no_grad():
            pre_CB = wide(pre_BC).T.contiguous()
            theta_C = upper_quantiles(pre_CB.T, density).clamp(min=self._options.floor)
            self.log_threshold_F.data[rows] = theta_C.log().to(self.log_threshold_F)
            self.bandwidth_F[rows] = self._bandwidth(pre_CB, theta_C).to(self.bandwidth_F)

    def _bandwidth(self, pre_CB: Tensor, theta_C: Tensor) -> Tensor:
        """`bandwidth` interquartile ranges, widened until the window holds a share `occupancy` of the sample."""
        n = pre_CB.shape[1]
        lower_C, upper_C = order_statistics(pre_CB, [max(1, round(q * n)) for q in (0.25, 0.75)])
        eps_C = (self._options.bandwidth * (upper_C - lower_C)).clamp(min=self._options.floor)
        wanted = min(n, math.ceil(self._options.occupancy * n))
        if wanted > 0:
            distance_CB = (pre_CB - theta_C[:, None]).abs()
            # The window is open, |p - theta| < eps/2: a hair beyond the nearest `wanted` entries.
            nearest_C = distance_CB.topk(wanted, dim=1, largest=False).values[:, -1]
            eps_C = torch.maximum(eps_C, 2 * nearest_C * (1 + 1e-5))
        return eps_C

    @torch.no_grad()
    def reach_F(self) -> Tensor:
        """theta - eps/2, the lower edge of the window: at or below it an entry has neither value nor gradient."""
        return self.log_threshold_F.exp() - self.bandwidth_F / 2

    def refinement_F(self) -> Tensor | None:
        """The learned step of each feature, from 0 on."""
        return self.step_F

    def rectangle_F(self) -> tuple[Tensor, Tensor] | None:
        """(log theta, window) [F] but for the ramp of an envelope and for a window that is tested on z."""
        return None if self._ramp or self._post else (self.log_threshold_F, self.bandwidth_F)

    def threshold_F(self) -> Tensor:
        """theta [F], with its graph."""
        return self.log_threshold_F.exp()


def _settled(options: Any, plan: Plan) -> Any:
    return evolve(options, occupancy=1.0 / plan.recipe.budget.batch) if options.occupancy == 0.0 else options


def _derived(options: Any, plan: Plan) -> list[Derived]:
    given = options.occupancy != 1.0 / plan.recipe.budget.batch
    formula = "given" if given else "1 / budget.batch"
    return [Derived(path="occupancy", value=options.occupancy, formula=formula, origin="activation")]


@activation("jumprelu")
class JumpReLU:
    """JumpReLU with a windowed pseudo-gradient at the threshold (2407.14435), tested on the pre-activation.

    `bandwidth`: window width in interquartile ranges of the pre-activation. `start`: active features at the start of
    training, as a multiple of the target (calibration reads it). `floor`: least threshold and window width.
    `occupancy`: least share of entries in a window, 0 for one per batch: rarer ones leave a threshold without gradient.
    `pre_bias`: encode y - b_dec. `refine`: one step of the selected coefficients towards least squares, by a learned
    step per feature; the same features are on, with less error, and no other library reads such a dictionary. `post`:
    repeat a fault of public trainers, which test the window of the count on z: it
    sees the upper half alone, so that the count presses half as hard as it should.
    """

    capturable: ClassVar[bool] = True
    bandwidth: float = field(default=0.1, validator=gt(0.0))
    start: float = field(default=4.0, validator=gt(0.0))
    floor: float = field(default=1e-3, validator=gt(0.0))
    occupancy: float = field(default=0.0, validator=ge(0.0))
    pre_bias: bool = False
    post: bool = False
    refine: bool = False

    def settle(self, plan: Plan) -> JumpReLU:
        """Fills `occupancy` from the batch."""
        settled: JumpReLU = _settled(self, plan)
        return settled

    def derive(self, plan: Plan) -> list[Derived]:
        """The least occupancy's row for `spalf compile`."""
        return _derived(self, plan)

    def build(self, width: int) -> Activator:
        return JumpReLUActivator(width, self)


@activation("jumprelu_moreau")
class JumpReLUMoreau:
    """JumpReLU whose gate has the slope of the Moreau envelope of the step (2512.09720), options as of `jumprelu`.

    The envelope's slope lies above the threshold, on (theta, theta + eps], gamma = eps^2 / 2; the publication puts it
    below, where pressure falls on units that are already off. The reconstruction keeps the two-sided rectangle: it
    needs the error on both sides of the threshold, or it misses theta^2 |d|^2 of the true gradient. `push`: the gate's
    slope also pushes barely active pre-activations down.
    """

    capturable: ClassVar[bool] = True
    bandwidth: float = field(default=0.1, validator=gt(0.0))
    start: float = field(default=4.0, validator=gt(0.0))
    floor: float = field(default=1e-3, validator=gt(0.0))
    occupancy: float = field(default=0.0, validator=ge(0.0))
    pre_bias: bool = False
    push: bool = False
    refine: bool = False

    def settle(self, plan: Plan) -> JumpReLUMoreau:
        """Fills `occupancy` from the batch."""
        settled: JumpReLUMoreau = _settled(self, plan)
        return settled

    def derive(self, plan: Plan) -> list[Derived]:
        """The least occupancy's row for `spalf compile`."""
        return _derived(self, plan)

    def build(self, width: int) -> Activator:
        return JumpReLUActivator(width, self)
