"""Refined coefficients on lists, forward and back in one node: what is off is not followed, and one list serves all.

Shape letters as in spalf/core/values.py. `spalf.nn.StratifiedAutoencoder.refined` says what is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from spalf.core.built import Autoencoder
from spalf.core.mesh import Mesh
from spalf.core.values import Code, White, per_feature
from spalf.kernels import affine, device, lists
from spalf.kernels.update import Shares


@frozen(kw_only=True, eq=False)
class Held:
    """A code's lists, the decoder in the precision of products, where its gradient goes, and whether sums have one
    order."""

    found: lists.Lists
    low_FD: Tensor
    shares: Shares
    in_order: bool


class _Refine(torch.autograd.Function):
    """[z + step <v, w> / gain]+ where an entry is on; v = (y - gain z W_dec - b) A, the error by the metric's form."""

    @staticmethod
    def forward(
        ctx: Any,
        z_BK: Tensor,
        weight_FD: Tensor,
        gain: Tensor,
        shift_D: Tensor,
        step_F: Tensor,
        white_BD: Tensor,
        gate_BK: Tensor,
        form_DD: Tensor,
        held: Held,
        mesh: Mesh,
    ) -> Tensor:
        found, low_FD = held.found, held.low_FD
        form_DD = form_DD.to(low_FD.dtype)
        sum_BD = mesh.sum(lists.gather_sum(found.index_BK, z_BK, found.count_B, low_FD))
        v_BD = affine.residual(white_BD.contiguous(), sum_BD, gain, shift_D, low_FD.dtype) @ form_DD
        dots = lists.gather_dots(found.index_BK, found.count_B, v_BD, low_FD, gate_BK)
        (rows, capacity), out_BK, pull_BK = z_BK.shape, torch.empty_like(z_BK), torch.empty_like(z_BK)
        device.refine[(rows,)](
            dots.parts_SBK, found.index_BK, found.count_B, z_BK, gate_BK, step_F, gain, out_BK, pull_BK,
            len(dots.parts_SBK), rows * capacity, capacity, BLOCK=dots.block, num_warps=1,
        )  # fmt: skip
        ctx.save_for_backward(z_BK, weight_FD, gain, step_F, gate_BK, form_DD, sum_BD, v_BD, out_BK, pull_BK)
        ctx.held, ctx.mesh = held, mesh
        return out_BK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z_BK, weight_FD, gain, step_F, gate_BK, form_DD, sum_BD, v_BD, out_BK, pull_BK = ctx.saved_tensors
        held: Held = ctx.held
        found, low_FD, width, (rows, capacity) = held.found, held.low_FD, weight_FD.shape[0], z_BK.shape
        direct_BK, force_BK, dots_B = torch.empty_like(z_BK), torch.empty_like(z_BK), z_BK.new_empty(rows)
        to_step = torch.empty_like(z_BK) if held.in_order else torch.zeros_like(step_F)
        device.refine_back[(rows,)](
            grads[0].contiguous(), found.index_BK, found.count_B, gate_BK, out_BK, step_F, gain, pull_BK,
            direct_BK, force_BK, to_step, dots_B, capacity,
            SUMS=not held.in_order, BLOCK=lists.power_of_2(capacity, 16, 256), num_warps=1,
        )  # fmt: skip
        if held.in_order:
            to_step = per_feature(to_step, found.index_BK, width, in_order=True)
        # through <v, w>: force v at the rows, and back through A to the error, which is -gain times the sum
        to_v_BD = ctx.mesh.sum(lists.gather_sum(found.index_BK, force_BK, found.count_B, low_FD))
        to_error_BD = (to_v_BD.to(low_FD.dtype) @ form_DD.T).float()
        to_sum_BD, dot, to_shift_D = affine.backward(to_error_BD, sum_BD, -gain)
        dots = lists.gather_dots(found.index_BK, found.count_B, to_sum_BD, low_FD)
        to_weight = None
        if held.shares.open:
            held.shares.add(found, force_BK, v_BD)
            held.shares.add(found, z_BK, to_sum_BD)
        else:
            to_weight = lists.by_feature(found, force_BK, v_BD, width)
            to_weight += lists.by_feature(found, z_BK, to_sum_BD, width)
        to_gain = -dot - dots_B.sum() / gain
        to_white = to_error_BD if ctx.needs_input_grad[5] else None
        return dots.sum(direct_BK), to_weight, to_gain, -to_shift_D, to_step, to_white, None, None, None, None


def refined(code: Code, white_BD: White, step_F: Tensor, form_DD: Tensor, sae: Autoencoder, held: Held) -> Tensor:
    """z [B, K] of the refined code."""
    gate_BK, mesh = code.gate_BK.detach(), sae.machine.mesh
    out: Tensor = _Refine.apply(  # type: ignore[no-untyped-call]
        code.z_BK, sae.W_dec_FD, sae.log_gain.exp(), sae.b_dec_D, step_F, white_BD, gate_BK, form_DD, held, mesh
    )
    return out
