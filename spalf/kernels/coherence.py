"""Mean squared cosine of co-active directions, with its gradient in closed form.

Shape letters as in spalf/core/values.py; R sampled rows, U distinct features, N entries of all sampled rows together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spalf.core.protocols import Autoencoder
from spalf.core.values import Code, White
from spalf.kernels.reference import coactive


class _Coherence(torch.autograd.Function):
    """Mean over rows, those without a pair left out, of the mean squared cosine of a row's pairs of directions.

    With M the unit directions of a row and C = M M' without its diagonal, the value of k directions is
    ||C||_F^2 / (k (k - 1)) and its gradient at M is 4 C M over the same.
    """

    @staticmethod
    def forward(ctx: Any, rows_UD: Tensor, which_N: Tensor, slot_N: Tensor, k_R: Tensor, listed: int) -> Tensor:
        norm_U1 = torch.linalg.vector_norm(rows_UD, dim=1, keepdim=True).clamp(min=1e-12)
        unit_UD = rows_UD / norm_U1
        unit_RKD = unit_UD.new_zeros(k_R.shape[0], listed, unit_UD.shape[1])
        unit_RKD.view(-1, unit_UD.shape[1]).index_copy_(0, slot_N, unit_UD.index_select(0, which_N))
        cosine_RKK = unit_RKD @ unit_RKD.mT
        cosine_RKK.diagonal(dim1=1, dim2=2).zero_()
        pairs_R = (k_R * (k_R - 1)).to(unit_UD.dtype)
        share_R = 1 / (pairs_R.clamp(min=1) * (pairs_R > 0).sum().clamp(min=1))
        ctx.save_for_backward(unit_UD, norm_U1, unit_RKD, cosine_RKK, share_R, which_N, slot_N)
        return torch.dot(torch.linalg.vector_norm(cosine_RKK, dim=(1, 2)).square(), share_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        unit_UD, norm_U1, unit_RKD, cosine_RKK, share_R, which_N, slot_N = ctx.saved_tensors
        to_RKD = (cosine_RKK * (4 * grads[0] * share_R)[:, None, None]) @ unit_RKD
        to_ND = to_RKD.view(-1, unit_UD.shape[1]).index_select(0, slot_N)
        to_UD = torch.zeros_like(unit_UD).index_add_(0, which_N, to_ND)
        # through w / ||w||: what lies along w has no effect
        along_U1 = torch.linalg.vecdot(unit_UD, to_UD).unsqueeze(1)
        return torch.addcmul(to_UD, unit_UD, along_U1, value=-1).div_(norm_U1), None, None, None, None


def coactivation(
    code: Code,
    sae: Autoencoder,
    sample_R: Tensor,
    rows: slice,
    direction: Callable[[White], Tensor],
    draw: torch.Generator,
) -> Tensor:
    """`reference.coactivation` with its gradient in closed form: a dozen operations where autograd has sixty."""
    held = coactive(code, sae, sample_R, rows, direction, draw)
    out: Tensor = _Coherence.apply(held.rows_UD, held.which_N, held.slot_N, held.k_R, held.listed)  # type: ignore[no-untyped-call]
    return out
