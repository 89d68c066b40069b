"""A JumpReLU's jump on lists, one kernel each way, where plain torch takes some forty passes over the lists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spalf.kernels import device
from spalf.kernels.lists import Lists, power_of_2, sum_by_feature, turn_over

_BLOCK = 256


class _Jump(torch.autograd.Function):
    """(z, gate, rows by feature that are on), with the rectangle's estimates as gradients at log theta (2407.14435)."""

    @staticmethod
    def forward(
        ctx: Any, pre_BK: Tensor, log_threshold_F: Tensor, bandwidth_F: Tensor, found: Lists, in_order: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        theta_F = log_threshold_F.exp()
        (rows, capacity), z_BK, gate_BK = pre_BK.shape, torch.empty_like(pre_BK), torch.empty_like(pre_BK)
        fired_F = torch.zeros(len(theta_F), dtype=torch.int32, device=pre_BK.device)
        device.jump[(rows,)](
            pre_BK, found.index_BK, found.count_B, theta_F, z_BK, gate_BK, fired_F, capacity,
            BLOCK=power_of_2(capacity, 16, _BLOCK), num_warps=1,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(fired_F)
        ctx.save_for_backward(pre_BK, theta_F, bandwidth_F)
        ctx.found, ctx.in_order = found, in_order
        return z_BK, gate_BK, fired_F

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        pre_BK, theta_F, bandwidth_F = ctx.saved_tensors
        found, (rows, capacity) = ctx.found, pre_BK.shape
        grad_z, grad_gate = (None if g is None else g.contiguous() for g in grads[:2])
        to_pre_BK = torch.empty_like(pre_BK)
        to_log = torch.empty_like(pre_BK) if ctx.in_order else torch.zeros_like(theta_F)
        device.jump_back[(rows,)](
            pre_BK, found.index_BK, found.count_B, theta_F, bandwidth_F,
            pre_BK if grad_z is None else grad_z, pre_BK if grad_gate is None else grad_gate,
            to_pre_BK, to_log, capacity,
            HAS_Z=grad_z is not None, HAS_GATE=grad_gate is not None, SUMS=not ctx.in_order,
            BLOCK=power_of_2(capacity, 16, _BLOCK), num_warps=1,
        )  # fmt: skip
        if ctx.in_order:
            by = turn_over([found], len(theta_F))
            to_log = sum_by_feature(by, by.take(to_log), torch.ones((rows, 1), device=to_log.device), len(theta_F))[
                :, 0
            ]
        return to_pre_BK if grad_z is not None else None, to_log, None, None, None


def jump(
    pre_BK: Tensor, found: Lists, log_threshold_F: Tensor, bandwidth_F: Tensor, in_order: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(z [B, K], gate [B, K] in {0, 1}, int32 [F] of how many rows each feature is on in); all float32 but the last.

    `in_order`: the gradient at log theta is summed in one order, at the price of a sort, and not by atomics.
    """
    out: tuple[Tensor, Tensor, Tensor] = _Jump.apply(pre_BK, log_threshold_F, bandwidth_F, found, in_order)  # type: ignore[no-untyped-call]
    return out
